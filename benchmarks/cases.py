"""The cases of the comparisons: which images of a source train, and which test.

Groups of near-duplicates stay on one side; a quarter of the images tests, another one for each seed.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL.Image import Resampling
from PIL.Image import open as open_image

from datamodules.splits import grouped_split
from datamodules.table import list_images

TEST_SHARE, FEW = 0.25, 20


class Image(NamedTuple):
    """An image by its path below the root, with what the division goes by."""

    path: str
    label: str
    group: str
    split: str | None = None


@dataclass(frozen=True)
class Case:
    """Images of one source, all that train or 20 a class.

    Attributes:
        source: of the images.
        few: whether 20 a class are drawn.
        development: whether a part of the training images tests, and those that test otherwise are left alone.
        short_side: in pixels, to which images are made smaller before anybody sees them; None: as they are.
    """

    source: str
    few: bool
    development: bool = False
    short_side: int | None = None

    def __str__(self) -> str:
        smaller = "" if self.short_side is None else f"-{self.short_side}px"
        return f"{self.source}-{FEW if self.few else 'full'}{smaller}{'-development' if self.development else ''}"

    @property
    def epochs(self) -> int:
        return 20 if self.few else 5

    @property
    def seeds(self) -> range:
        return range(5 if self.few else 3)


def divide(images: list[Image], seed: int) -> list[Image]:
    """Give images that come undivided a split; of others, validation images train."""
    if images[0].split is not None:
        return [image._replace(split="test" if image.split == "test" else "train") for image in images]
    groups, classes = [image.group for image in images], [(image.label,) for image in images]
    shares = {"train": 1 - TEST_SHARE, "test": TEST_SHARE}
    splits = grouped_split(groups, classes, shares, seed, complete="train")
    return [image._replace(split=str(split)) for image, split in zip(images, splits, strict=True)]


def draw(images: list[Image], seed: int) -> list[Image]:
    """The test images, and 20 a class of those that train, or all where there are fewer."""
    rng = np.random.default_rng((FEW, seed))
    kept = [row for row, image in enumerate(images) if image.split == "test"]
    for label in sorted({image.label for image in images}):
        of_class = [row for row, image in enumerate(images) if image.split == "train" and image.label == label]
        kept += rng.choice(of_class, min(FEW, len(of_class)), replace=False).tolist()
    return [images[row] for row in sorted(kept)]


def make_smaller(images: Path, copies: Path, short_side: int) -> None:
    """Copy images, under the same names, at a short side of so many pixels, filtered as Lanczos has it."""
    for path in list_images(images, images):
        (copies / path).parent.mkdir(parents=True, exist_ok=True)
        with open_image(images / path) as image:
            scale = short_side / min(image.size)
            size = (max(short_side, round(scale * image.width)), max(short_side, round(scale * image.height)))
            image.resize(size, Resampling.LANCZOS).save(copies / path, quality=95)


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def write_csv(file: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows([header, *rows])
