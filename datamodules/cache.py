"""Decoded images on disk, so that an image is decoded once and not once an epoch."""

import mmap
import os
import shutil
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.cache_entry import PIXELS, PLACE, PixelFile, Record, digest, overhead, read_record, write_record
from datamodules.cache_folder import IN_USE, CacheFolder, explaining
from datamodules.contents import ContentMemo
from datamodules.errors import DataError
from datamodules.locks import share, waiting_lock
from datamodules.storage import Storage

_TYPES = ("uint8", "uint16", "float32")

Prepare = Callable[[int], NDArray[Any]]
Progress = Callable[[int, int], None]


class ImageCache:
    """Decoded images on disk: one file of raw pixels, one index; read by memory map from any number of processes.

    An entry belongs to a recipe and to the contents of its images, whatever their files are called. It is moved in
    place when it is whole and checked when it is read; one that is damaged or of another version is built again.
    While an instance lives, no process removes its entry to make room. Instances may be pickled; they hold nothing
    open then, and open their files where they are first read.

    Instances are made by :meth:`open`. ``len()`` is how many images are kept, those of the first positions.
    """

    def __init__(self, entry: Path, record: Record, index: NDArray[np.void]) -> None:
        self._entry = entry
        self._record = record
        self._index = index
        self._dtype = np.dtype(record.dtype)
        self._pixels: mmap.mmap | bytes | None = None
        self._lock = -1
        self._checked = bytearray(len(index))

    @classmethod
    def open(
        cls,
        folder: Path,
        storage: Storage,
        rows: Sequence[int],
        recipe: Mapping[str, Any],
        prepare: Prepare,
        limit_bytes: int,
        progress: Progress | None = None,
        on_wait: Callable[[], None] | None = None,
        threads: int = 1,
    ) -> "ImageCache":
        """Find the cache of some images, or build it.

        A file whose size and time of change are as they were is not read again. A process that wants what another is
        building waits for it. An entry of the same files before they changed is removed; others are removed to make
        room, least recently used first, but for those in use. The files must not change while they are read.

        Args:
            folder: of the cache; made if it is absent. Any number of processes and data sets may share it.
            storage: where the images lie.
            rows: which of them, in the order of their positions in the cache.
            recipe: all that ``prepare`` depends on besides the encoded images; plain, as JSON holds it.
            prepare: gives the pixels of a row, ``(height, width, channels)`` in uint8, uint16 or float32, the same
                for all. Called in threads.
            limit_bytes: for all that lies in ``folder``. Images that do not fit any more are not kept.
            progress: called with the number of images kept and of all images, after each.
            on_wait: called once if another process is building the same.
            threads: that read and prepare images, at least 1.

        Raises:
            DataError: the folder cannot be written, or the disk is full.
            OSError: an image cannot be read; whatever ``prepare`` raises.
            TypeError: ``prepare`` gives something else than is said above.
        """
        rows = [int(row) for row in rows]
        with explaining(folder):
            place = CacheFolder(folder.absolute(), limit_bytes)
            memo = ContentMemo(place.memo)
        try:
            contents = memo.digests(storage, rows, threads)
        finally:
            with explaining(folder):
                memo.save()
        key = digest(recipe, contents)
        if (found := cls._find(place, key)) is not None:
            return found
        with ExitStack() as held:
            with explaining(folder):
                held.enter_context(waiting_lock(place.lock(key), on_wait))
            if (found := cls._find(place, key)) is not None:  # built by whom we have waited for
                return found
            _Build(place, key, storage, rows, dict(recipe), prepare, progress, threads).run()
            if (built := cls._load(place.entry(key))) is None:
                raise DataError(
                    f"data.cache: expected to read what was written in '{folder}', found it damaged; check that disk, "
                    "set data.cache to a folder on another, or go without a cache."
                )
            return built

    @classmethod
    def _find(cls, folder: CacheFolder, key: str) -> "ImageCache | None":
        """An entry that is sound and keeps as many images as it may; others have made room for it."""
        with explaining(folder.root):
            cache = cls._load(folder.entry(key))
            if cache is None:
                return None
            record = cache._record
            size = record.length + overhead(record.recipe, record.rows)
            bound_was_lowered = record.length > folder.limit_bytes
            # Another build is worth its time only if clearly more images fit than did.
            if bound_was_lowered or (record.wanted and folder.most_room(key) > 1.1 * size + record.wanted):
                return None
            folder.make_room(key, size)
            return cache

    @classmethod
    def _load(cls, entry: Path) -> "ImageCache | None":
        """An entry as it lies; None if it is absent, damaged or of another version."""
        if (found := read_record(entry)) is None:
            return None
        cache = cls(entry, *found)
        return cache if cache._map() else None

    def __len__(self) -> int:
        return len(self._index)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageCache, (self._entry, self._record, self._index)

    def get(self, position: int) -> NDArray[Any] | None:
        """Pixels of an image, ``(height, width, channels)``, a read-only view of the file.

        The first time that a process reads an image it is checked, at some gigabytes a second.

        Returns:
            None for an image that is not kept, is damaged (the cache is then built again when it is next opened), or
            was removed before this process first read one.

        Raises:
            IndexError: there is no such position.
        """
        if not 0 <= position < self._record.rows:
            raise IndexError(f"position {position} of {self._record.rows} images")
        if position >= len(self._index) or not (self._pixels is not None or self._map()):
            return None
        offset, height, width, channels, crc32 = self._index[position].item()
        pixels = np.ndarray((height, width, channels), self._dtype, self._pixels, offset)
        if not self._checked[position]:
            if zlib.crc32(pixels.data) != crc32:
                with suppress(OSError):  # a full disk
                    os.pwrite(self._lock, b"damaged", 0)  # into this entry, even if another is in its place by now
                return None
            self._checked[position] = True
        return pixels

    def _map(self) -> bool:
        """Map the file and keep the entry from being removed; gives whether it is there and of the right length."""
        length = self._record.length
        try:
            with (self._entry / PIXELS).open("rb") as file:
                if os.fstat(file.fileno()).st_size != length:
                    return False
                pixels = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ) if length else b""
            lock = share(self._entry / IN_USE)
        except OSError:
            return False
        weakref.finalize(self, os.close, lock)
        self._pixels, self._lock = pixels, lock
        return True


@dataclass(frozen=True)
class _Build:
    """One build of an entry, by whoever has the lock of its key. For the attributes see :meth:`ImageCache.open`."""

    folder: CacheFolder
    key: str
    storage: Storage
    rows: Sequence[int]
    recipe: dict[str, Any]
    prepare: Prepare
    progress: Progress | None
    threads: int

    def run(self) -> None:
        building = self.folder.building(self.key)
        names = [self.storage.location, *map(self.storage.describe, self.rows)]
        subject = digest(self.recipe, os.fsencode("\0".join(names)))
        with explaining(self.folder.root):
            self.folder.sweep()
            self.folder.remove(self.key)
            self._remove_stale(subject)
            building.mkdir()
        try:
            with closing(self._images()) as images:
                record, index = self._write(images, subject)
            with explaining(self.folder.root):
                write_record(building, record, index)
                building.rename(self.folder.entry(self.key))
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _remove_stale(self, subject: str) -> None:
        """Remove entries of the same files with other contents: changed back, the files would be read again anyway."""
        for other in self.folder.neighbours(self.key)[0]:
            found = read_record(self.folder.entry(other.key))
            if found is not None and found[0].subject == subject:
                self.folder.evict(other.key)

    def _images(self) -> Generator[tuple[NDArray[Any], int], None, None]:
        """Prepared images with their checksums, in order; only a few are in memory."""
        waiting: deque[Future[tuple[NDArray[Any], int]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for row in self.rows:
                    waiting.append(pool.submit(_prepared, self.prepare, row))
                    if len(waiting) > 2 * self.threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _write(self, images: Iterator[tuple[NDArray[Any], int]], subject: str) -> tuple[Record, NDArray[np.void]]:
        """Write images while there is room."""
        dtype: np.dtype[Any] | None = None
        places: list[tuple[int, ...]] = []
        wanted = 0
        with closing(PixelFile(self.folder, self.key, overhead(self.recipe, len(self.rows)))) as file:
            for image, crc32 in images:
                dtype = image.dtype if dtype is None else dtype
                if image.dtype != dtype:
                    raise TypeError(f"expected images of one type, found {dtype} and {image.dtype}")
                offset = file.append(image)
                if offset is None:
                    wanted = image.nbytes
                    break
                places.append((offset, *image.shape, crc32))
                if self.progress is not None:
                    self.progress(len(places), len(self.rows))
        kind = _TYPES[0] if dtype is None else dtype.str
        record = Record(self.recipe, subject, len(self.rows), kind, file.length, wanted)
        return record, np.array(places, PLACE)


def _prepared(prepare: Prepare, row: int) -> tuple[NDArray[Any], int]:
    image = prepare(row)
    if image.ndim != 3 or image.dtype.name not in _TYPES:
        raise TypeError(f"expected (height, width, channels) of {', '.join(_TYPES)}, found {image.shape} {image.dtype}")
    image = np.ascontiguousarray(image, image.dtype.newbyteorder("<"))
    return image, zlib.crc32(image.data)
