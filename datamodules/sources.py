"""Datamodules of tables, Hugging Face datasets and streamed chunks; what they share is in ``base``.

Each has its own settings first and takes those that all sources share by name, as ``**common``: spelled out, the same
twenty would stand in five classes. The command line knows, checks and explains every one of them all the same.
"""

from pathlib import Path
from typing import Any

from datamodules.base import ImageDataModule
from datamodules.errors import DataError
from datamodules.huggingface import read_dataset
from datamodules.manifest import read_manifest
from datamodules.streaming import read_stream
from datamodules.table import Listing


class ManifestDataModule(ImageDataModule):
    """Images that a table lists, one a row, with the columns ``path`` and ``label``.

    Columns ``split``, ``group`` and ``weight`` are used where they are there (see
    :func:`~datamodules.manifest.read_manifest`).

    Args:
        manifest: CSV or Parquet file, by its suffix.
        separator: between the classes of one image, which may then have any number of them; none: exactly one.
        path_column: of files, relative to ``root``; without it, to the manifest's own folder.
        label_column: of classes.
        split_column: of train, val and test; blank: to be divided.
        group_column: of what must not be on both sides of a split; blank: the image on its own.
        weight_column: of weights in the training loss, above 0.
        common: settings of every source (see :class:`~datamodules.base.ImageDataModule`).
    """

    def __init__(
        self,
        manifest: str,
        separator: str | None = None,
        path_column: str = "path",
        label_column: str = "label",
        split_column: str = "split",
        group_column: str = "group",
        weight_column: str = "weight",
        **common: Any,
    ) -> None:
        self.manifest = Path(manifest).expanduser()
        self.separator = separator
        self.columns = {
            "path_column": path_column,
            "label_column": label_column,
            "split_column": split_column,
            "group_column": group_column,
            "weight_column": weight_column,
        }
        super().__init__(**common)

    @property
    def dataset_name(self) -> str:
        return self.manifest.stem

    def find_images(self) -> Listing:
        root = None if self.root is None else Path(self.root)
        return read_manifest(self.manifest, root, separator=self.separator, **self.columns)


class HuggingFaceDataModule(ImageDataModule):
    """A dataset of the library ``datasets`` that ``save_to_disk`` has written to the folder ``root``.

    Its splits train, validation and test are kept; one without them is divided (see
    :func:`~datamodules.huggingface.read_dataset`).

    Args:
        image_column: of images; ``auto``: the only one.
        label_column: of classes; ``auto``: the only one. Lists of classes: an image may have any number of them.
        group_column: of what must not be on both sides of a split.
        weight_column: of weights in the training loss, above 0.
        common: settings of every source (see :class:`~datamodules.base.ImageDataModule`).
    """

    def __init__(
        self,
        image_column: str = "auto",
        label_column: str = "auto",
        group_column: str | None = None,
        weight_column: str | None = None,
        **common: Any,
    ) -> None:
        self.columns = image_column, label_column, group_column, weight_column
        super().__init__(**common)

    def find_images(self) -> Listing:
        if self.root is None:
            raise DataError("data.root: expected the folder of a saved dataset, found none; give --data.root <folder>.")
        return read_dataset(Path(self.root), *self.columns)


class StreamingDataModule(ImageDataModule):
    """Images in chunks, in the folder or at the address ``root``, as ``python -m pipeline convert`` writes them.

    Training goes through the chunks in random order, a few at a time, so that few need to be at hand (see
    :func:`~datamodules.sampling.chunkwise_order`).

    Args:
        chunks: folder where fetched chunks are kept; none: below ``~/.cache``.
        chunks_gigabytes: most that they may take there, in 10^9 bytes; at least two chunks.
        common: settings of every source (see :class:`~datamodules.base.ImageDataModule`).
    """

    def __init__(self, chunks: str | None = None, chunks_gigabytes: float = 20.0, **common: Any) -> None:
        self.chunks = None if chunks is None else Path(chunks)
        self.chunks_gigabytes = chunks_gigabytes
        super().__init__(**common)

    @property
    def dataset_name(self) -> str:
        return str(self.root).rstrip("/").rpartition("/")[2]

    def find_images(self) -> Listing:
        if self.root is None:
            raise DataError(
                "data.root: expected a folder or s3://bucket/folder, found none; give --data.root <address>."
            )
        return read_stream(self.root, self.chunks, self.chunks_gigabytes)
