"""What images contain, as digests, without reading files again that have not changed."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from datamodules.errors import DataError
from datamodules.locks import waiting_lock
from datamodules.storage import Storage

#: Length in bytes of the digest of a content (BLAKE2b).
DIGEST_SIZE = 16

_ROWS_AT_ONCE = 256  # one task a row would cost more than asking a file for its size
_MOST_REMEMBERED = 2_000_000  # files, at 48 bytes each; those noted first are forgotten first
# Clocks of file systems tick as slowly as this (FAT): a file changed a moment ago may change again unseen.
_TICK_NS = 2_000_000_000
_RECORD = np.dtype([("path", "V16"), ("size", "<i8"), ("mtime_ns", "<i8"), ("content", "V16")])

#: Size, time of the last change and digest of the content, by the digest of the path.
_Known = dict[bytes, tuple[int, int, bytes]]


def content_digest(source: Path | bytes) -> str:
    """Digest of an encoded image, in hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    return _blake2b(source if isinstance(source, bytes) else source.read_bytes()).hexdigest()


class ContentMemo:
    """Digests of contents, remembered in a file by path, size and time of the last change.

    A file whose size and time of change (in nanoseconds) are as noted is not read. A damaged memo is an empty one.
    Processes may share it: each adds what it has read.

    Args:
        file: where digests are remembered; need not exist.

    Example:
        >>> import tempfile
        >>> from datamodules.storage import FileStorage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "a.png").write_bytes(b"same"), (Path(folder) / "b.png").write_bytes(b"same")
        ...     memo = ContentMemo(Path(folder) / "contents.npy")
        ...     digests = memo.digests(FileStorage(Path(folder), ["a.png", "b.png"]), [0, 1], threads=1)
        >>> digests[:DIGEST_SIZE] == digests[DIGEST_SIZE:]
        True
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known = _read(file)
        self._new: _Known = {}

    def digests(self, storage: Storage, rows: Sequence[int], threads: int) -> bytes:
        """Digests of the encoded images, :data:`DIGEST_SIZE` bytes each, one after another in the order of ``rows``.

        Args:
            storage: where the images lie.
            rows: which of them.
            threads: that read.

        Raises:
            OSError: an image cannot be read.
        """

        def digests_from(start: int) -> bytes:
            return b"".join(self._digest(storage.source(row)) for row in rows[start : start + _ROWS_AT_ONCE])

        with ThreadPoolExecutor(threads) as pool:
            return b"".join(pool.map(digests_from, range(0, len(rows), _ROWS_AT_ONCE)))

    def save(self) -> None:
        """Add what was read to the file.

        Raises:
            OSError: it cannot be written.
        """
        if not self._new:
            return
        with waiting_lock(self.file.with_suffix(".lock")):
            known = _read(self.file) | self._new
            newest = islice(known.items(), max(0, len(known) - _MOST_REMEMBERED), None)
            records = np.array([(path, *noted) for path, noted in newest], _RECORD)
            temporary = self.file.with_suffix(".part")
            with temporary.open("wb") as opened:
                np.save(opened, records, allow_pickle=False)
            temporary.replace(self.file)

    def _digest(self, source: Path | bytes) -> bytes:
        if isinstance(source, bytes):
            return _blake2b(source).digest()
        path = os.path.abspath(source)
        name = _blake2b(os.fsencode(path)).digest()
        asked_ns = time.time_ns()
        found = os.stat(path)
        size, mtime_ns, content = self._known.get(name, (-1, -1, b""))
        if (size, mtime_ns) == (found.st_size, found.st_mtime_ns):
            return content
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, _blake2b).digest()
        if found.st_mtime_ns < asked_ns - _TICK_NS:
            self._new[name] = (found.st_size, found.st_mtime_ns, content)
        return content


def remembered_digests(storage: Storage, rows: Sequence[int], memo: Path, threads: int) -> list[str]:
    """Digests of encoded images, in hexadecimal digits; files that are as a memo noted them are not read.

    Args:
        storage: where the images lie.
        rows: which of them.
        memo: file of a :class:`ContentMemo`; it and its folder are made where they are missing.
        threads: that read.

    Raises:
        OSError: an image cannot be read.
        DataError: the memo cannot be written.
    """
    with _kept_in(memo.parent):
        memo.parent.mkdir(parents=True, exist_ok=True)
    known = ContentMemo(memo)
    joined = known.digests(storage, rows, threads)
    with _kept_in(memo.parent):
        known.save()
    return [joined[start : start + DIGEST_SIZE].hex() for start in range(0, len(joined), DIGEST_SIZE)]


@contextlib.contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Says of the folder that it is not as it should be."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"features: expected to keep what belongs to them in '{folder}', found {error.strerror or error}; make "
            "room or choose another folder (finetuning.features, or XDG_CACHE_HOME)."
        ) from error


def _blake2b(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE)


def _read(file: Path) -> _Known:
    try:
        records = np.load(file, allow_pickle=False)
    except (OSError, EOFError, ValueError):  # none yet, or damaged
        return {}
    if records.dtype != _RECORD:
        return {}
    return {path: (size, mtime_ns, content) for path, size, mtime_ns, content in records.tolist()}
