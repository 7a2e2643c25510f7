"""The images of a data source, one row each, and what can be said of them without opening one."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError, printable
from datamodules.storage import SelectedStorage, Storage

#: File name endings that are taken for images.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".npy"})


@dataclass(frozen=True)
class Listing:
    """Images as their source lists them, not yet divided. Every list has one entry an image.

    Attributes:
        storage: where the images lie.
        paths: what the images are called; of files, relative to the storage's root, with forward slashes.
        labels: class of each image; where ``separator`` is set, any number of classes joined by it.
        given: the split that each image came with, or None.
        groups: what must not be on both sides of a split (a patient, a plant, a scene); None: every image on its own.
        weights: of each image in the training loss; None: all alike.
        strata: what drawn splits are balanced by; None: the labels.
        separator: between the classes of one image; None: each has exactly one class.
        metadata: what else the source says of each image, by name; None: nothing.
    """

    storage: Storage
    paths: list[str]
    labels: list[str]
    given: list[str | None]
    groups: list[str] | None = None
    weights: list[float] | None = None
    strata: list[str] | None = None
    separator: str | None = None
    metadata: dict[str, list[str]] | None = None

    def without(self, rows: set[int]) -> "Listing":
        """The same without some images."""
        left = [row for row in range(len(self.paths)) if row not in rows]
        changes: dict[str, Any] = {"storage": SelectedStorage(self.storage, left)} if rows else {}
        for name in ("paths", "labels", "given", "groups", "weights", "strata"):
            column = getattr(self, name)
            changes[name] = None if column is None else [column[row] for row in left]
        if self.metadata is not None:
            changes["metadata"] = {key: [column[row] for row in left] for key, column in self.metadata.items()}
        return replace(self, **changes)

    def classes_of(self, row: int) -> tuple[str, ...]:
        """The classes of an image: one, or any number where there is a separator."""
        label = self.labels[row]
        if self.separator is None:
            return (label,)
        return tuple(dict.fromkeys(part for name in label.split(self.separator) if (part := name.strip())))


@dataclass(frozen=True)
class ImageTable:
    """Images with their labels and splits.

    Attributes:
        listing: the images.
        splits: ``train``, ``val`` or ``test`` for each image.
        split_is_ours: whether the splits were drawn here (False: the data came divided).
    """

    listing: Listing
    splits: list[str]
    split_is_ours: bool

    @property
    def paths(self) -> list[str]:
        """What the images are called."""
        return self.listing.paths

    @property
    def labels(self) -> list[str]:
        """Class of each image, or its classes joined by the separator."""
        return self.listing.labels

    def rows(self, split: str) -> NDArray[np.int64]:
        """Row numbers of a split, in order."""
        return np.flatnonzero(np.array(self.splits) == split)

    def counts(self, split: str) -> Counter[str]:
        """Images per class in a split; an image of several classes counts for each."""
        return Counter(name for row in self.rows(split) for name in self.listing.classes_of(row))

    def targets(self, rows: NDArray[np.int64], classes: list[str], multi_label: bool) -> NDArray[Any]:
        """What a network is to answer for some rows.

        Args:
            rows: of the table.
            classes: in the order of the network's outputs; all that these rows have are among them.
            multi_label: whether an image may have several, or none.

        Returns:
            Int64 ``(N,)``; with ``multi_label`` float32 ``(N, number of classes)``, 1 for each class an image has.
        """
        number = {name: index for index, name in enumerate(classes)}
        labels = [[number[name] for name in self.listing.classes_of(row)] for row in rows]
        if not multi_label:
            return np.array([indices[0] for indices in labels], dtype=np.int64)
        targets = np.zeros((len(rows), len(classes)), np.float32)
        for place, indices in enumerate(labels):
            targets[place, indices] = 1
        return targets

    def named_rows(self) -> list[dict[str, str]]:
        """``path``, ``label``, ``split``, where there are any ``group`` and ``weight``, and ``bytes`` of every image.

        This is the manifest that a run keeps; with it a later run can divide the same images in the same way.
        """
        listing = self.listing
        rows = []
        for row, (path, label, split) in enumerate(zip(self.paths, self.labels, self.splits, strict=True)):
            named = {"path": path, "label": label, "split": split}
            if listing.groups is not None:
                named["group"] = listing.groups[row]
            if listing.weights is not None:
                named["weight"] = f"{listing.weights[row]:g}"
            rows.append({**named, "bytes": str(listing.storage.size(row))})
        return rows

    def require_classes(self, known: list[str]) -> None:
        """Refuse images of classes that a model does not know.

        Args:
            known: classes, in the model's order.

        Raises:
            DataError: an image has another one.
        """
        names = set(known)
        for row, split in enumerate(self.splits):
            for name in self.listing.classes_of(row):
                if name not in names:
                    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
                    raise DataError(
                        f"{self.listing.storage.describe(row)}: expected a class of the training images ({shown}), "
                        f"found '{name}' in {split}; add training images of it, move the image to a known class or "
                        "remove it."
                    )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every row: path, label, split, group, weight and size in bytes."""
        return digest_of(self.named_rows())


def digest_of(rows: list[dict[str, str]]) -> str:
    """SHA-256 of the rows of a manifest (see :meth:`ImageTable.named_rows`)."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(("\0".join(row.values()) + "\n").encode())
    return sha.hexdigest()


def walk_images(folder: Path) -> Iterator[str]:
    """Files below a folder that are called images, relative to it, one by one; hidden ones are passed over.

    Those of a folder come before those of the folders in it, each sorted. Links that lead nowhere, pipes and the like
    are among them, so that nothing is lost in silence: who opens them says what they are. Links to folders are not
    followed.

    Raises:
        DataError: a folder cannot be listed; a name is no UTF-8, and could not be written into any file of a run.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"data: expected folders that can be listed, found '{printable(str(error.filename))}' ({error.strerror}); "
            "let it be read, or move it elsewhere."
        ) from error

    for top, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or Path(name).suffix.lower() not in IMAGE_SUFFIXES:
                continue
            path = Path(top, name)
            found = path.relative_to(folder).as_posix()
            try:
                found.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"data: expected names of files in UTF-8, found '{printable(str(path))}'; rename it."
                ) from error
            yield found


def list_images(folder: Path, root: Path) -> list[str]:
    """What :func:`walk_images` finds below ``folder``, relative to ``root``, sorted."""
    below = folder.relative_to(root)
    return sorted((below / path).as_posix() for path in walk_images(folder))
