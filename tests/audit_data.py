"""Pictures and tables for the tests of the data audit."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from datamodules.storage import FileStorage, MemoryStorage
from datamodules.table import ImageTable, Listing


def scene(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A picture full of things, another for each seed."""
    rng = np.random.default_rng((17, seed))
    image = Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(60, 200, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        a, b = rng.uniform(4, width / 5, 2)
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - a / 2, y - b / 2, x + a / 2, y + b / 2), fill=colour)
    return image


def on_white(seed: int) -> Image.Image:
    """A small thing, another for each seed, on the same softly lit board."""
    y, x = np.mgrid[0:120, 0:160]
    light = 225 - 30 * (x / 160) ** 2 - 20 * (y / 120)
    noise = np.random.default_rng((5, seed)).normal(0, 2, (120, 160, 1))
    image = Image.fromarray((light[..., None] + noise).clip(0, 255).repeat(3, 2).astype(np.uint8))
    thing = scene(seed, 48, 40)
    image.paste(thing, (56, 40))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def table_in_memory(
    images: Sequence[bytes],
    labels: Sequence[str],
    splits: Sequence[str],
    names: Sequence[str] | None = None,
    **more: Any,
) -> ImageTable:
    paths = [f"{row}.png" for row in range(len(images))] if names is None else list(names)
    listing = Listing(MemoryStorage(images), paths, list(labels), [None] * len(paths), **more)
    return ImageTable(listing, list(splits), split_is_ours=True)


def table_of_files(root: Path, paths: Sequence[str], splits: Sequence[str]) -> ImageTable:
    """A table of files ``<class>/<name>`` that exist already."""
    listing = Listing(
        FileStorage(root, list(paths)), list(paths), [path.split("/")[0] for path in paths], [None] * len(paths)
    )
    return ImageTable(listing, list(splits), split_is_ours=False)
