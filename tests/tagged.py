"""Pictures with several classes, or none, and a datamodule that lists them."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.base import ImageDataModule
from datamodules.storage import FileStorage
from datamodules.table import Listing

#: Each class is a square of its colour at its own place.
SQUARES = {"blue": (40, 60, 230), "green": (40, 230, 60), "red": (230, 50, 40)}
_PLACES = {"blue": (2, 2), "green": (2, 22), "red": (22, 12)}


class TaggedImages(ImageDataModule):
    """``root/tags.csv`` says of each image: ``path``, ``labels`` joined by a bar, ``split``."""

    def find_images(self) -> Listing:
        root = Path(str(self.root)).resolve()
        with (root / "tags.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        paths = [row["path"] for row in rows]
        labels = [row["labels"] for row in rows]
        return Listing(FileStorage(root, paths), paths, labels, [row["split"] for row in rows], separator="|")


def write_tagged(folder: Path, splits: dict[str, list[str]], seed: int = 0) -> Path:
    """Pictures of the squares that their labels name, and ``tags.csv``; the folder.

    Args:
        folder: to be made.
        splits: labels of the images of each split, such as ``{"train": ["blue|red", ""]}``.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = [("path", "labels", "split")]
    for split, labels in splits.items():
        for number, label in enumerate(labels):
            pixels = rng.normal(120, 40, (40, 40, 3))
            for name in filter(None, label.split("|")):
                top, left = _PLACES[name]
                pixels[top : top + 16, left : left + 16] = rng.normal(SQUARES[name], 40, (16, 16, 3))
            path = f"{split}{number:03}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / path)
            rows.append((path, label, split))
    with (folder / "tags.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def drawn_labels(count: int, chances: dict[str, float], seed: int = 0) -> list[str]:
    """Labels in which each class is present by its own chance."""
    rng = np.random.default_rng(seed)
    return ["|".join(name for name, chance in chances.items() if rng.random() < chance) for _ in range(count)]
