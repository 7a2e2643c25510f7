"""Where encoded images lie: files below a folder, or rows of something else."""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError, printable


class Storage(ABC):
    """Encoded images by row number. Instances are sent to reading processes and hold nothing open.

    Attributes:
        location: a folder or an address, as people are told.
        blocks: number of the block that each image lies in, int64, one a row; images of a block are best read one after
            the other. None: any image is read as fast as any other.
        window: how many blocks may be read in turns.
        tried: whether every image has been decoded before, so that it need not be tried again.
    """

    location: str
    blocks: NDArray[np.int64] | None = None
    window: int = 1
    tried: bool = False

    @abstractmethod
    def source(self, row: int) -> Path | bytes:
        """What the decoder takes.

        Raises:
            OSError: it cannot be fetched.
        """

    @abstractmethod
    def size(self, row: int) -> int:
        """Length of the encoded image in bytes."""

    @abstractmethod
    def describe(self, row: int) -> str:
        """Where an image is, for messages."""


class FileStorage(Storage):
    """Files below a folder.

    Args:
        root: the folder, resolved.
        paths: of the files, relative to it, with forward slashes; one a row.
    """

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self.root = root
        self.paths = paths
        self.location = str(root)

    def source(self, row: int) -> Path:
        return self.root / self.paths[row]

    def size(self, row: int) -> int:
        return self.source(row).stat().st_size

    def describe(self, row: int) -> str:
        return printable(str(self.source(row)))


class MemoryStorage(Storage):
    """Encoded images that are held in memory.

    Args:
        encoded: the images; one a row.
    """

    location = "memory"

    def __init__(self, encoded: Sequence[bytes]) -> None:
        self.encoded = list(encoded)

    def source(self, row: int) -> bytes:
        return self.encoded[row]

    def size(self, row: int) -> int:
        return len(self.encoded[row])

    def describe(self, row: int) -> str:
        return f"image {row}"


class SelectedStorage(Storage):
    """Some rows of another storage.

    Args:
        storage: the other one.
        rows: of it, one for each row of this one.
    """

    def __init__(self, storage: Storage, rows: Sequence[int]) -> None:
        self.storage = storage
        self.rows = rows
        self.location = storage.location

    def source(self, row: int) -> Path | bytes:
        return self.storage.source(self.rows[row])

    def size(self, row: int) -> int:
        return self.storage.size(self.rows[row])

    def describe(self, row: int) -> str:
        return self.storage.describe(self.rows[row])


def require_inside(root: Path, paths: Sequence[str], key: str) -> None:
    """Refuse files that lie outside a folder, are absent or are no regular files (a pipe would never answer).

    Args:
        root: the folder, resolved.
        paths: relative to it.
        key: the setting to blame.

    Raises:
        DataError: names the first of them and counts the others.
    """
    folders: dict[str, bool] = {}  # links in folder names are followed once a folder, not once a file
    wrong: list[str] = []
    for path in paths:  # of which there may be millions: in strings, a third of the time that objects take
        file = os.path.join(root, path)
        parent = os.path.dirname(file)
        try:
            if parent not in folders:
                folders[parent] = Path(parent).resolve().is_relative_to(root)
            mode = os.lstat(file).st_mode
            inside = folders[parent]
            if inside and stat.S_ISLNK(mode):
                inside = Path(file).resolve().is_relative_to(root)
                mode = os.stat(file).st_mode
        except (OSError, ValueError, RuntimeError):  # absent, a name with a null byte, a circle of links
            wrong.append(f"nothing at '{printable(file)}'")
            continue
        if not inside:
            wrong.append(f"'{printable(file)}', which leads out of it")
        elif not stat.S_ISREG(mode):
            wrong.append(f"'{printable(file)}', which is no regular file")
    if wrong:
        more = f" (and {len(wrong) - 1:,} more like it)" if len(wrong) > 1 else ""
        raise DataError(
            f"{key}: expected image files in '{root}', found {wrong[0]}{more}; correct the paths, or set data.root to "
            "a folder that holds all of them."
        )
