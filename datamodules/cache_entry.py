"""What lies in an entry of a cache of images: a file of pixels, its index, a record, and a lock that tells its use.

The pixels of the images lie one after another, as numpy holds them, each at a multiple of 64 bytes. Index and record
are sealed by one checksum, and the index has a checksum of the pixels of every image.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.cache_folder import IN_USE, CacheFolder, explaining

#: Of the layout; entries of another version are built again.
VERSION = 1
#: Name of the file of pixels.
PIXELS = "pixels.bin"
#: One row of the index.
PLACE = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("channels", "<i4"), ("crc32", "<u4")])

_INDEX, _RECORD = "index.npy", "about.json"
_ALIGNMENT = 64
_CLAIM = 2**26  # bytes by which a file of pixels grows at a time


@dataclass(frozen=True)
class Record:
    """What an entry is.

    Attributes:
        recipe: how the images were prepared.
        subject: digest of the recipe and of what the images are called; the entry's key is one of what they contain.
        rows: images in all, kept or not.
        dtype: of the pixels, as numpy writes it.
        length: of the file of pixels, in bytes.
        wanted: bytes of the first image that was not kept for want of room; 0: all are kept.
        version: of the layout.
    """

    recipe: dict[str, Any]
    subject: str
    rows: int
    dtype: str
    length: int
    wanted: int
    version: int = VERSION


def digest(recipe: Mapping[str, Any], data: bytes) -> str:
    """32 hexadecimal digits (BLAKE2b) that tell a recipe, as JSON, together with some bytes from all others."""
    head = json.dumps(dict(recipe), sort_keys=True).encode()
    return hashlib.blake2b(head + b"\0" + data, digest_size=16).hexdigest()


def overhead(recipe: Mapping[str, Any], rows: int) -> int:
    """Bytes that are reckoned for all of an entry but its pixels."""
    return rows * PLACE.itemsize + len(json.dumps(dict(recipe))) + 4096


def write_record(entry: Path, record: Record, index: NDArray[np.void]) -> None:
    """Write all of an entry but its pixels.

    Raises:
        OSError: the files cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    sealed = {"record": asdict(record), "seal": digest(asdict(record), buffer.getvalue())}
    (entry / _INDEX).write_bytes(buffer.getvalue())
    (entry / _RECORD).write_text(json.dumps(sealed, indent=1), encoding="utf-8")
    (entry / IN_USE).touch()


def read_record(entry: Path) -> tuple[Record, NDArray[np.void]] | None:
    """Record and index of an entry; None if it is absent, damaged or of another version."""
    try:
        sealed = json.loads((entry / _RECORD).read_bytes())
        index = (entry / _INDEX).read_bytes()
        record = sealed["record"]
        sound = sealed["seal"] == digest(record, index) and (entry / IN_USE).stat().st_size == 0
        if not sound or record["version"] != VERSION:
            return None
        return Record(**record), np.load(io.BytesIO(index), allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError):  # the last three: not what we wrote
        return None


class PixelFile:
    """The file of pixels of an entry that is being built, written from its start.

    It is made longer before it is filled, so that whoever builds another entry reckons with what this one will take.

    Args:
        folder: of the cache.
        key: of the entry, which whoever writes has the lock of.
        overhead: bytes that the rest of the entry will take.

    Raises:
        DataError: the file cannot be written, as in all methods.
    """

    def __init__(self, folder: CacheFolder, key: str, overhead: int) -> None:
        self._folder = folder
        self._key = key
        self._overhead = overhead
        self._claimed = 0
        #: Bytes up to the end of the last image.
        self.length = 0
        with explaining(folder.root):
            self._file = (folder.building(key) / PIXELS).open("wb", buffering=0)

    def append(self, image: NDArray[Any]) -> int | None:
        """Write the pixels of a contiguous array; gives its offset, or None if there is no room for it."""
        start = -(-self.length // _ALIGNMENT) * _ALIGNMENT
        end = start + image.nbytes
        with explaining(self._folder.root):
            if end > self._claimed and not self._claim(end):
                return None
            self._file.seek(start)
            _write_all(self._file, image)
        self.length = end
        return start

    def _claim(self, end: int) -> bool:
        room = self._folder.make_room(self._key, end + self._overhead) - self._overhead
        if room < end:
            return False
        self._claimed = min(room, end + _CLAIM)
        self._file.truncate(self._claimed)
        return True

    def close(self) -> None:
        """Give back what was claimed and not needed."""
        with explaining(self._folder.root), self._file:
            self._file.truncate(self.length)


def _write_all(file: io.FileIO, image: NDArray[Any]) -> None:
    rest = image.reshape(-1).view(np.uint8).data
    while rest:
        rest = rest[file.write(rest) :]
