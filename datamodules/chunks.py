"""A folder of fetched files that never holds more than it may, shared by all processes of a machine."""

import os
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

#: How many files may be fetched at the same time, by all processes together. Each file has its slot, in which it is
#: fetched once however many ask for it; so many slots, that two files seldom share one.
SLOTS = 32
_POLL_SECONDS = 0.01


class ChunkCache:
    """Fetches files when they are asked for, and throws out those that were not asked for the longest.

    Room is made, and reserved, before a file is fetched, so that the folder holds at most ``limit`` bytes at any time.
    What a killed process has left behind is used or thrown out by the next one. Instances hold nothing open.

    Args:
        folder: of the cache, resolved; all that ends in .bin or .part below it is ours.
        limit: in bytes; at least the largest file.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def open(self, name: str, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        """A file of the cache, open for reading.

        Args:
            name: below the folder, ending in .bin.
            size: in bytes.
            fetch: writes the contents into an open file, if need be.

        Raises:
            OSError: it cannot be fetched, or not be written.
        """
        file = self.folder / name
        try:
            return _open_and_touch(file)
        except FileNotFoundError:
            pass
        file.parent.mkdir(parents=True, exist_ok=True)
        slot = zlib.crc32(name.encode()) % SLOTS
        with self._lock(f"slot-{slot}"):
            try:
                return _open_and_touch(file)  # another process has fetched it in the meantime
            except FileNotFoundError:
                return self._fetch(file, size, self.folder / f"slot-{slot}.part", fetch)

    def _fetch(self, file: Path, size: int, part: Path, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        while not self._reserve(part, size):
            time.sleep(_POLL_SECONDS)  # all the room is taken by files that others are fetching
        try:
            contents = part.open("r+b")
            fetch(contents)
            contents.flush()
            part.replace(file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        # Still open, so that this reader gets its bytes even if another one throws the file out at once.
        return contents

    def _reserve(self, part: Path, size: int) -> bool:
        """Make room for a file and take it by a file of that length; False where there is none at the moment."""
        with self._lock("room"):
            # Those being fetched first: one that is done in between is then counted twice rather than not at all.
            excess = (
                size - self.limit + sum(self._held_by(other) for other in self.folder.glob("*.part") if other != part)
            )
            files = sorted(
                (status.st_mtime_ns, status.st_size, file)
                for file in self.folder.rglob("*.bin")
                if (status := file.stat())
            )
            excess += sum(length for _, length, _ in files)
            for _, length, file in files:
                if excess > 0:
                    file.unlink()
                    excess -= length
            if excess > 0:
                return False
            with part.open("wb") as reservation:
                reservation.truncate(size)
            return True

    def _held_by(self, part: Path) -> int:
        """Length of a file that is being fetched; nothing where its process has gone."""
        try:
            with self._lock(part.stem, timeout=0):
                part.unlink(missing_ok=True)
                return 0
        except Timeout:
            return _length(part)

    def _lock(self, name: str, timeout: float = -1) -> AbstractContextManager[object]:
        return FileLock(self.folder / f"{name}.lock").acquire(timeout=timeout, poll_interval=_POLL_SECONDS)


def _open_and_touch(file: Path) -> BinaryIO:
    contents = file.open("rb")
    os.utime(contents.fileno())
    return contents


def _length(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
