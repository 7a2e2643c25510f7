"""The folder of a cache: its entries, the room for them, and removing them while other processes work in it."""

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datamodules.errors import DataError
from datamodules.locks import lock_if_free, unshared

#: In every entry: whoever reads the entry shares this lock; its time of change is that of the last use.
IN_USE = "used"

# An entry, one that is being built and one that is being removed. Nothing else in the folder is ever touched.
_OURS = re.compile(r"([0-9a-f]{32})(|\.building|\.removed)")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Tell people what to do where the folder of a cache fails.

    Raises:
        DataError: in place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(
                f"data.cache: expected room for decoded images in '{folder}', found: {error.strerror}; lower "
                "data.cache_gigabytes, set data.cache to a folder on a larger disk, or go without a cache."
            ) from error
        raise DataError(
            f"data.cache: expected a folder where files can be written and locked, found '{folder}' ({error}); set "
            "data.cache to another folder, or go without a cache."
        ) from error


@dataclass(frozen=True)
class Neighbour:
    """Another entry that no process reads or builds.

    Attributes:
        key: its name.
        size: in bytes.
        used_ns: when it was last opened, in nanoseconds since 1970.
    """

    key: str
    size: int
    used_ns: int


class CacheFolder:
    """Entries below one folder, each a folder named by its key (32 hexadecimal digits).

    A process changes an entry only while it has the entry's lock; see :meth:`lock`.

    Args:
        root: the folder; made if it is absent.
        limit_bytes: for everything of the cache that lies in it.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        #: Where digests of contents are remembered.
        self.memo = root / "contents.npy"
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()  # asked early: reading all images first would take long

    def entry(self, key: str) -> Path:
        """Where a whole entry lies."""
        return self.root / key

    def building(self, key: str) -> Path:
        """Where an entry lies until it is whole."""
        return self.root / f"{key}.building"

    def lock(self, key: str) -> Path:
        """The lock file of an entry."""
        return self.root / f"{key}.lock"

    def remove(self, key: str) -> None:
        """Remove an entry, and what an earlier build or removal of it left. Asks for its lock to be had.

        It vanishes at once. Processes that have mapped its files go on reading them.
        """
        removed = self.root / f"{key}.removed"
        shutil.rmtree(removed, ignore_errors=True)
        if self.entry(key).exists():
            self.entry(key).rename(removed)
            shutil.rmtree(removed)
        shutil.rmtree(self.building(key), ignore_errors=True)

    def sweep(self) -> None:
        """Remove what processes that were killed left behind."""
        for key in {key for key, suffix, _ in self._contents() if suffix}:
            with lock_if_free(self.lock(key)) as free:
                if free:
                    shutil.rmtree(self.building(key), ignore_errors=True)
                    shutil.rmtree(self.root / f"{key}.removed", ignore_errors=True)

    def neighbours(self, key: str) -> tuple[list[Neighbour], int]:
        """Other entries that may be removed, least recently used first, and the bytes of all else but ``key``'s own."""
        removable = []
        staying = _size(self.memo)
        for other, suffix, path in self._contents():
            if other == key:
                continue
            size = _size(path)
            with unshared(path / IN_USE) as free:
                if suffix or not free:
                    staying += size
                else:
                    removable.append(Neighbour(other, size, _changed_ns(path / IN_USE)))
        return sorted(removable, key=lambda entry: entry.used_ns), staying

    def evict(self, key: str) -> bool:
        """Remove an entry, if no process reads or builds it; gives whether it was removed."""
        with lock_if_free(self.lock(key)) as free, unshared(self.entry(key) / IN_USE) as unread:
            if free and unread:
                self.remove(key)
                return True
        return False

    def make_room(self, key: str, size: int) -> int:
        """Remove other entries, least recently used first, until an entry may take ``size`` bytes.

        Returns:
            Bytes that it may take: less than ``size`` where too much else must stay.
        """
        removable, staying = self.neighbours(key)
        room = self.limit_bytes - staying - sum(entry.size for entry in removable)
        for entry in removable:
            if room >= size:
                break
            if self.evict(entry.key):
                room += entry.size
        return room

    def most_room(self, key: str) -> int:
        """Bytes that an entry could take if all that may be removed were."""
        return self.limit_bytes - self.neighbours(key)[1]

    def _contents(self) -> Iterator[tuple[str, str, Path]]:
        for path in self.root.iterdir():
            if found := _OURS.fullmatch(path.name):
                yield found[1], found[2], path


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder; 0 where it has been removed."""
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.iterdir())
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
