"""Writing images as chunks that can be streamed (see :mod:`datamodules.streaming`)."""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.objects import is_empty, is_remote, streaming_missing, upload
from datamodules.splits import SPLITS
from datamodules.storage import Storage
from datamodules.streaming import INDEX, MANIFEST, METADATA
from datamodules.table import Listing

# A chunk says in 32 bits where its images begin.
_LARGEST_CHUNK = 4_000
# Images that are read ahead of the writer, and how many at a time.
_AHEAD = 64
_READERS = 8


def convert(
    listing: Listing,
    address: str,
    chunk_megabytes: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write images as chunks, to be trained on from where they are then.

    Every image keeps its bytes, and its path, label, split, group, weight and stratum. A chunk holds images of one
    split, drawn at random, so that a few chunks are a fair sample even of images that are sorted by class. The
    manifest is written last: without it, a conversion that was interrupted is not taken for a whole one.

    Args:
        listing: the images; divide them first where their splits are to be drawn, so that each split has its chunks.
        address: an empty folder, or ``s3://bucket/folder`` with nothing below it.
        chunk_megabytes: size of a chunk, in 10^6 bytes, from 1 to 4,000.
        seed: of the order of the images.
        progress: called after each image with the number of images written and that of all.

    Raises:
        DataError: the address is not empty or cannot be written to; an image cannot be read.
    """
    if not 1 <= chunk_megabytes <= _LARGEST_CHUNK:
        raise DataError(f"chunk_megabytes: expected 1 to {_LARGEST_CHUNK:,}, found {chunk_megabytes}.")
    parts = _shuffled_splits(listing, seed)
    try:
        if is_remote(address):
            _require(is_empty(address), address)
            with TemporaryDirectory() as folder:
                _write(listing, parts, Path(folder), partial(_move, address=address), chunk_megabytes, progress)
        else:
            target = Path(address).expanduser()
            target.mkdir(parents=True, exist_ok=True)
            _require(not any(target.iterdir()), address)
            _write(listing, parts, target, _keep, chunk_megabytes, progress)
    except OSError as error:
        raise DataError(
            f"{address}: expected a place that can be written to, found {error}; look at the address, the credentials "
            "and the free space."
        ) from error


def _require(empty: bool, address: str) -> None:
    if not empty:
        raise DataError(
            f"{address}: expected nothing there yet, found files (without {MANIFEST} they are of a conversion that was "
            "interrupted); choose another address or remove them."
        )


def _shuffled_splits(listing: Listing, seed: int) -> list[NDArray[np.int64]]:
    """The rows of every split that there is, in random order; those not yet divided come last."""
    rng = np.random.default_rng(seed)
    given = np.array([split or "" for split in listing.given])
    parts = [rng.permutation(np.flatnonzero(given == split)) for split in (*SPLITS, "")]
    return [rows for rows in parts if len(rows)]


def _write(
    listing: Listing,
    parts: list[NDArray[np.int64]],
    folder: Path,
    publish: Callable[[Path], None],
    chunk_megabytes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Chunks, then their index, then the manifest; each is published when it is whole."""
    try:
        from litdata.streaming.writer import BinaryWriter
    except ImportError as error:
        raise streaming_missing("litdata") from error
    chunks: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    sizes: list[int] = []
    for rows in parts:
        writer = BinaryWriter(str(folder), chunk_bytes=chunk_megabytes * 1_000_000, chunk_index=len(chunks))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "An item was larger than the target chunk size")
            for number, image in enumerate(_images(listing.storage, rows)):
                finished = writer.add_item(number, image)
                if finished is not None:
                    publish(Path(finished))
                sizes.append(len(image))
                if progress is not None:
                    progress(len(sizes), len(listing.paths))
            for last in writer.done():
                publish(Path(last))
        index = Path(writer.write_chunks_index())
        part = json.loads(index.read_text())
        index.unlink()
        chunks += part["chunks"]
        config = part["config"]
    content = {"chunks": chunks, "config": config, "updated_at": str(time.time())}
    (folder / INDEX).write_text(json.dumps(content, sort_keys=True))
    publish(folder / INDEX)
    unfinished = folder / f"{MANIFEST}.part"
    _write_manifest(listing, np.concatenate(parts), sizes, unfinished)
    publish(unfinished.rename(folder / MANIFEST))


def _images(storage: Storage, rows: NDArray[np.int64]) -> Iterator[bytes]:
    with ThreadPoolExecutor(_READERS) as readers:
        for start in range(0, len(rows), _AHEAD):
            yield from readers.map(partial(_image, storage), rows[start : start + _AHEAD].tolist())


def _image(storage: Storage, row: int) -> bytes:
    try:
        source = storage.source(row)
        return source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise DataError(
            f"{storage.describe(row)}: expected an image that can be read, found {error}; repair or remove it."
        ) from error


def _write_manifest(listing: Listing, rows: NDArray[np.int64], sizes: list[int], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "path": listing.paths,
        "label": listing.labels,
        "split": listing.given,
        "group": listing.groups,
        "weight": listing.weights,
        "stratum": listing.strata,
        **{f"{METADATA}{name}": column for name, column in (listing.metadata or {}).items()},
    }
    table = pa.table({name: pa.array(values).take(rows) for name, values in columns.items() if values is not None})
    table = table.append_column("bytes", pa.array(sizes, pa.int64()))
    separator = {} if listing.separator is None else {"separator": listing.separator}
    pq.write_table(table.replace_schema_metadata(separator), file)


def _keep(_: Path) -> None:
    """A folder's files are where they belong."""


def _move(file: Path, address: str) -> None:
    upload(file, address)
    file.unlink()
