"""Images without a codec, and ways to open a cache of them, for tests."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.cache import ImageCache
from datamodules.storage import FileStorage, Storage

RECIPE = {"short_side": 448, "channels": 3, "dtype": "uint8", "version": 1}
AMPLE = 2**30
LONG_AGO_NS = 1_600_000_000_000_000_000


class Decoder:
    """Decodes the images of a storage and remembers which."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.rows: list[int] = []

    def __call__(self, row: int) -> np.ndarray:
        self.rows.append(row)
        source = self.storage.source(row)
        return np.load(io.BytesIO(source) if isinstance(source, bytes) else source)


def picture(seed: int, shape: tuple[int, ...] = (8, 10, 3), dtype: str = "uint8") -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) * 255).astype(dtype)


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image)
    return buffer.getvalue()


def write_pictures(folder: Path, pictures: Sequence[np.ndarray]) -> FileStorage:
    """Files that were last changed long ago."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.npy" for number in range(len(pictures))]
    for name, image in zip(names, pictures, strict=True):
        rewrite(folder / name, encoded(image), LONG_AGO_NS)
    return FileStorage(folder, names)


def rewrite(path: Path, content: bytes, mtime_ns: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))


def open_cache(
    folder: Path, storage: Storage, rows: Sequence[int], recipe: Mapping[str, Any] = RECIPE, **settings: Any
) -> tuple[ImageCache, list[int]]:
    """The cache, and the rows that were decoded for it."""
    decoder = Decoder(storage)
    settings = {"prepare": decoder, "limit_bytes": AMPLE, **settings}
    return ImageCache.open(folder, storage, rows, recipe, **settings), decoder.rows


def entries(folder: Path) -> list[Path]:
    """Whole entries; asserts that nothing half-made, removed by half or locked lies beside them."""
    assert [path.name for path in folder.iterdir() if path.suffix not in ("", ".npy")] == []
    return sorted(path for path in folder.iterdir() if path.is_dir())


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def assert_holds(cache: ImageCache, pictures: Sequence[np.ndarray]) -> None:
    """The cache keeps exactly these."""
    assert len(cache) == len(pictures)
    for position, expected in enumerate(pictures):
        found = cache.get(position)
        assert found is not None
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected, strict=True)
