"""Images in chunks, in a folder or an object store: for data that is larger than a disk.

Chunks and their index are in the format of LitData (https://github.com/Lightning-AI/litData) and can be read with it;
each item is an encoded image. ``manifest.parquet`` beside them says what the images are, in the order of the chunks.
:func:`datamodules.conversion.convert` writes all of it.
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datamodules.chunks import ChunkCache
from datamodules.errors import DataError
from datamodules.objects import download, is_remote
from datamodules.storage import Storage
from datamodules.table import Listing

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "index.json"
MANIFEST = "manifest.parquet"
METADATA = "metadata."  # before the names of columns that are nothing else

#: Chunks that are mixed at most. Eight are a few thousand images; with more the first batches would have to wait.
MOST_MIXED = 8


def read_stream(address: str, cache_folder: Path | None = None, cache_gigabytes: float = 20.0) -> Listing:
    """Images that :func:`datamodules.conversion.convert` has written; no chunk is read.

    Args:
        address: a folder, read where it is, or ``s3://bucket/folder``, of which chunks are fetched when needed.
        cache_folder: where fetched chunks are kept; None: below ``~/.cache``.
        cache_gigabytes: most that the cache folder may hold, in 10^9 bytes; at least two chunks.

    Raises:
        DataError: nothing complete is there, or it is of another format; the cache is too small.
    """
    remote = is_remote(address)
    address = address.rstrip("/") if remote else str(Path(address).expanduser().resolve())
    manifest = _read(address, MANIFEST)
    table, separator = _table(manifest, address)
    layout = Layout.of(_read(address, INDEX), table["bytes"].to_numpy(), address)
    paths = table["path"].to_pylist()
    cache = None
    if remote:
        default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "transfer-pipeline" / "chunks"
        cache = ChunkCache((cache_folder or default).expanduser().resolve(), int(cache_gigabytes * 1e9))
        largest = int(layout.lengths.max())
        if cache.limit < 2 * largest:
            raise DataError(
                f"data.cache_gigabytes: expected {2 * largest / 1e9:.3g} or more, which two chunks of {address} take, "
                f"found {cache_gigabytes:g}; raise it, or convert the data to smaller chunks."
            )
    version = hashlib.sha256(address.encode() + b"\0" + manifest).hexdigest()[:16]
    optional = {name: table[name].to_pylist() for name in ("group", "weight", "stratum") if name in table.column_names}
    return Listing(
        storage=StreamedStorage(address, paths, layout, cache, version),
        paths=paths,
        labels=table["label"].to_pylist(),
        given=table["split"].to_pylist(),
        groups=optional.get("group"),
        weights=optional.get("weight"),
        strata=optional.get("stratum"),
        separator=separator,
        metadata={
            name.removeprefix(METADATA): table[name].to_pylist()
            for name in table.column_names
            if name.startswith(METADATA)
        }
        or None,
    )


@dataclass(frozen=True)
class Layout:
    """Where images are in chunks.

    A chunk of LitData is, in unsigned 32-bit integers, the number of items, where each begins and where the last ends;
    then the items. An item that is bytes is their number, in the same way, and the bytes.

    Attributes:
        files: names of the chunks.
        lengths: of the chunks in bytes, shape ``(chunks,)``.
        blocks: chunk of each image, shape ``(images,)``, never decreasing.
        starts: of each image in its chunk, shape ``(images,)``.
        sizes: of each image, shape ``(images,)``.
    """

    files: list[str]
    lengths: NDArray[np.int64]
    blocks: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @classmethod
    def of(cls, index: bytes, sizes: NDArray[np.int64], address: str) -> "Layout":
        """From LitData's index and the number of bytes of each image.

        Raises:
            DataError: the items are anything but bytes as they are (LitData can also keep pickled objects, which we
                never read), or the index is of other images.
        """
        try:
            content = json.loads(index)
            config, chunks = content["config"], content["chunks"]
            files = [str(chunk["filename"]) for chunk in chunks]
            counts = np.array([chunk["chunk_size"] for chunk in chunks], dtype=np.int64)
            lengths = np.array([chunk["chunk_bytes"] for chunk in chunks], dtype=np.int64)
            formats, *encodings = (config[name] for name in ("data_format", "compression", "encryption"))
            blocks = np.repeat(np.arange(len(files)), counts)
        except (ValueError, KeyError, TypeError) as error:
            raise _not_converted(
                address, f"an {INDEX} that cannot be read ({type(error).__name__}: {error})"
            ) from error
        if formats != ["bytes"] or any(encodings):
            raise _not_converted(address, f"items of {formats} (compressed or encrypted by {encodings})")
        if 0 < len(blocks) == len(sizes) and counts.all() and all(Path(file).name == file for file in files):
            heads = 4 * (counts + 2)
            before = np.cumsum(sizes + 4) - (sizes + 4)
            first = np.cumsum(counts) - counts
            starts = before - before[first][blocks] + heads[blocks] + 4
            if np.array_equal(heads + np.add.reduceat(sizes + 4, first), lengths):
                return cls(files, lengths, blocks, starts, sizes)
        raise _not_converted(address, f"an {INDEX} and a {MANIFEST} of different images")

    def head(self, block: int) -> NDArray[np.uint32]:
        """What a chunk begins with."""
        rows = slice(*np.searchsorted(self.blocks, [block, block + 1]))
        items = self.starts[rows] - 4
        return np.array([len(items), *items, self.lengths[block]], dtype=np.uint32)


class StreamedStorage(Storage):
    """Encoded images in chunks.

    Args:
        address: a folder, or ``s3://bucket/folder``.
        names: of the images, one a row.
        layout: where they are.
        cache: of fetched chunks; None: they are read where they are.
        version: tells these chunks from other ones in the cache.

    Attributes:
        blocks: chunk of each image, shape ``(images,)``: images of one chunk are best read one after the other.
        window: how many chunks may be mixed (see :func:`datamodules.sampling.chunkwise_order`): half the cache, so
            that chunks can be fetched while others are being read.
    """

    blocks: NDArray[np.int64]
    tried = True  # converting decodes every image first

    def __init__(
        self, address: str, names: Sequence[str], layout: Layout, cache: ChunkCache | None, version: str
    ) -> None:
        self.location = address
        self.names = names
        self.layout = layout
        self.cache = cache
        self.version = version
        self.blocks = layout.blocks
        self.window = MOST_MIXED if cache is None else min(MOST_MIXED, cache.limit // int(layout.lengths.max()) // 2)

    def source(self, row: int) -> bytes:
        with self._open(int(self.blocks[row])) as chunk:
            chunk.seek(int(self.layout.starts[row]))
            data = chunk.read(self.size(row))
        if len(data) != self.size(row):
            raise OSError(f"{self.location}: {self.layout.files[self.blocks[row]]} ends too early")
        return data

    def size(self, row: int) -> int:
        return int(self.layout.sizes[row])

    def describe(self, row: int) -> str:
        return f"{self.names[row]} in {self.location}"

    def _open(self, block: int) -> BinaryIO:
        file = self.layout.files[block]
        if self.cache is None:
            return Path(self.location, file).open("rb")
        return self.cache.open(f"{self.version}/{file}", int(self.layout.lengths[block]), partial(self._fetch, block))

    def _fetch(self, block: int, file: BinaryIO) -> None:
        download(self.location, self.layout.files[block], file)
        expected = self.layout.head(block)
        file.seek(0)
        if not np.array_equal(np.frombuffer(file.read(expected.nbytes), np.uint32), expected):
            raise OSError(f"{self.location}: {self.layout.files[block]} holds other images than {MANIFEST} says")


def _read(address: str, name: str) -> bytes:
    try:
        if not is_remote(address):
            return Path(address, name).read_bytes()
        contents = io.BytesIO()
        download(address, name, contents)
        return contents.getvalue()
    except FileNotFoundError as error:
        raise _not_converted(address, f"no {name}") from error
    except OSError as error:
        raise DataError(
            f"data.root: expected data that can be read at {address}, found {error}; look at the address and at the "
            "credentials."
        ) from error


def _table(manifest: bytes, address: str) -> "tuple[pa.Table, str | None]":
    """The rows, and the separator of classes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(manifest))
        needed = [table["path"], table["label"], table["bytes"].cast(pa.int64()), table["split"]]
    except (pa.ArrowException, KeyError) as error:
        raise _not_converted(address, f"a {MANIFEST} that cannot be read ({error})") from error
    if any(column.null_count for column in needed[:3]):
        raise _not_converted(address, f"a {MANIFEST} with gaps")
    separator = (table.schema.metadata or {}).get(b"separator")
    return table, None if separator is None else separator.decode()


def _not_converted(address: str, found: str) -> DataError:
    return DataError(
        f"data.root: expected data at {address} as `python -m pipeline convert` writes it, found {found}; convert the "
        "data again, to an empty place."
    )
