"""The images of a data source, one row each, and what can be said of them without opening one."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.splits import SPLITS, stratified_split

#: File name endings that are taken for images.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ImageTable:
    """Images with their labels and splits.

    Attributes:
        root: folder that the paths are relative to.
        paths: of the files, with forward slashes.
        labels: class of each image.
        splits: ``train``, ``val`` or ``test`` for each image.
        split_is_ours: whether the splits were drawn here (False: the data came divided).
    """

    root: Path
    paths: list[str]
    labels: list[str]
    splits: list[str]
    split_is_ours: bool

    def rows(self, split: str) -> NDArray[np.int64]:
        """Row numbers of a split, in order."""
        return np.flatnonzero(np.array(self.splits) == split)

    def counts(self, split: str) -> Counter[str]:
        """Images per class in a split."""
        return Counter(label for label, where in zip(self.labels, self.splits, strict=True) if where == split)

    def named_rows(self) -> list[tuple[str, str, str]]:
        """Path, label and split of every image."""
        return list(zip(self.paths, self.labels, self.splits, strict=True))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every row: path, label, split and size of the file in bytes."""
        sha = hashlib.sha256()
        for path, label, split in self.named_rows():
            sha.update(f"{path}\0{label}\0{split}\0{(self.root / path).stat().st_size}\n".encode())
        return sha.hexdigest()


def list_images(folder: Path, root: Path) -> list[str]:
    """Image files below ``folder`` at any depth, relative to ``root``, sorted; hidden files are passed over."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    found = (path.relative_to(root) for path in files)
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def divide(
    root: Path,
    paths: Sequence[str],
    labels: Sequence[str],
    given: Sequence[str],
    strata: Sequence[str],
    fractions: dict[str, float],
    seed: int,
) -> ImageTable:
    """Complete the splits: those the data brings are kept, the others are taken out of the training images.

    Args:
        root: folder that the paths are relative to.
        paths: one for each image.
        labels: one for each image.
        given: the split that each image came with (``train`` where there was none).
        strata: what the drawn splits are balanced by, one for each image.
        fractions: share of all undivided images that goes to ``val`` and ``test``, each in (0, 1).
        seed: of the drawn splits.

    Raises:
        DataError: a class has fewer images than there are splits to put it in, or fractions leave no training set.
    """
    for split, fraction in fractions.items():
        if not 0 < fraction < 1:
            raise DataError(f"data.{split}_fraction: expected a share between 0 and 1, found {fraction}.")
    missing = [split for split in SPLITS if split not in given]
    train_share = 1 - sum(fractions[split] for split in missing)
    if train_share <= 0:
        raise DataError(
            f"data.val_fraction and data.test_fraction: expected a sum below 1, found {1 - train_share:g}; lower one."
        )
    splits = list(given)
    if missing:
        undivided = [row for row, split in enumerate(given) if split == "train"]
        for label, count in sorted(Counter(labels[row] for row in undivided).items()):
            if count <= len(missing):
                raise DataError(
                    f"data.root: expected at least {len(missing) + 1} images of class '{label}' to divide among train, "
                    f"{' and '.join(missing)}, found {count} in {root}; add images or remove the class."
                )
        shares = {"train": train_share} | {split: fractions[split] for split in missing}
        drawn = stratified_split([strata[row] for row in undivided], shares, seed)
        for row, split in zip(undivided, drawn, strict=True):
            splits[row] = str(split)
    return ImageTable(root, list(paths), list(labels), splits, split_is_ours=bool(missing))
