"""Images in a dataset that the package ``datasets`` (Hugging Face) has saved to disk."""

import difflib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import DataError
from datamodules.manifest import as_weight, column_as_text
from datamodules.splits import SPLIT_NAMES
from datamodules.storage import Storage
from datamodules.table import Listing

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

#: Between the classes of an image: the first of them that is in no class name.
SEPARATORS = ("|", ";", ",", "/", "\x1f")


def read_dataset(
    folder: Path,
    image_column: str = "auto",
    label_column: str = "auto",
    group_column: str | None = None,
    weight_column: str | None = None,
) -> Listing:
    """Images and labels of a ``Dataset`` or ``DatasetDict`` that was written by ``save_to_disk``.

    The dataset is read where it lies, memory-mapped; nothing in it is run and nothing is fetched. Images are called
    by their file names where these differ, otherwise by their row numbers, after the name of their split:
    ``train/000012``. Labels are class names, text or whole numbers; where each row has a list of them, an image has
    any number of classes.

    Args:
        folder: that ``save_to_disk`` was given.
        image_column: of images, of encoded bytes, or of paths (as text, relative to the folder or absolute); ``auto``:
            the only one of images, or the one called image or img.
        label_column: of classes; ``auto``: the only one of class labels, or the one called label or labels.
        group_column: of what must not be on both sides of a split; null or blank: the image on its own.
        weight_column: of weights in the training loss, finite and above 0.

    Raises:
        DataError: the folder holds no such dataset; a column is missing or of a type that will not do; an image, a
            label or a weight is missing; a split is not one of train, validation and test; ``datasets`` is not
            installed.
    """
    folder = folder.expanduser().resolve()
    splits = _load(folder)
    columns = _Columns(folder, splits)
    image = columns.image(image_column)
    images = _encoded(splits, image)
    names = _names(splits, images["path"].to_pylist())
    storage = ArrowStorage(folder, image, names)
    columns.require(_present(images, folder), names, "image_column", image, "an image")

    label = columns.label(label_column)
    classes = columns.classes(label)
    separator = None
    if _is_list(columns.features[label]):
        separator = next(mark for mark in SEPARATORS if not any(mark in name for each in classes for name in each))
    else:
        columns.require([each != [""] for each in classes], names, "label_column", label, "a class")
    weights = None
    if weight_column is not None:
        weights = [as_weight(text) for text in columns.text(weight_column, "weight_column")]
        columns.require([weight > 0 for weight in weights], names, "weight_column", weight_column, "a weight above 0")
    return Listing(
        storage=storage,
        paths=names,
        labels=[(separator or "").join(each) for each in classes],
        given=[SPLIT_NAMES.get(split) for split, data in splits.items() for _ in range(data.num_rows)],
        groups=None if group_column is None else columns.text(group_column, "group_column"),
        weights=weights,
        separator=separator,
    )


class ArrowStorage(Storage):
    """Encoded images in a saved dataset, or files that it names. Every process maps the dataset for itself.

    Args:
        folder: of the dataset, resolved.
        column: of the images.
        names: of the images, one a row, split after split.
    """

    def __init__(self, folder: Path, column: str, names: Sequence[str]) -> None:
        self.folder = folder
        self.column = column
        self.names = names
        self.location = str(folder)

    def source(self, row: int) -> Path | bytes:
        data: bytes | None = self._images["bytes"][row].as_py()
        return self._file(row) if data is None else data

    def size(self, row: int) -> int:
        data = self._images["bytes"][row].as_buffer()
        return self._file(row).stat().st_size if data is None else int(data.size)

    def describe(self, row: int) -> str:
        return f"{self.names[row]} in {self.folder}"

    def _file(self, row: int) -> Path:
        return self.folder / str(self._images["path"][row].as_py())

    @cached_property
    def _images(self) -> "dict[str, pa.ChunkedArray]":
        return _encoded(_load(self.folder), self.column)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_images"}


def _load(folder: Path) -> "dict[str, Dataset]":
    """The splits by name; of a lone dataset, one without a name."""
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise DataError(
            'data: expected the installed package datasets, found none; pip install "transfer-pipeline[huggingface]".'
        ) from error
    if not folder.is_dir():
        raise DataError(f"data.root: expected the folder of a saved dataset, found none at '{folder}'.")
    try:
        found = load_from_disk(str(folder), keep_in_memory=False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:  # files absent, empty or damaged
        raise DataError(
            f"data.root: expected a dataset in '{folder}' as save_to_disk writes it, found none that can be read "
            f"({type(error).__name__}: {error}); save it again, without empty splits."
        ) from error
    splits = {"": found} if isinstance(found, Dataset) else dict(found)
    unknown = [name for name in splits if name and name not in SPLIT_NAMES]
    if unknown:
        raise DataError(
            f"data.root: expected splits called train, validation and test in '{folder}', found '{unknown[0]}'; rename "
            "it, or save the dataset without it."
        )
    return splits


def _encoded(splits: "dict[str, Dataset]", column: str) -> "dict[str, pa.ChunkedArray]":
    """``bytes`` and ``path`` of every image; one of them may be null."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Image

    tables = [data.cast_column(column, Image(decode=False)).data for data in splits.values()]
    images = pa.chunked_array([chunk for table in tables for chunk in table.column(column).chunks], Image.pa_type)
    return {name: pc.struct_field(images, name) for name in ("bytes", "path")}


def _present(images: "dict[str, pa.ChunkedArray]", folder: Path) -> list[bool]:
    """Whether there are bytes, or a file where they are said to be."""
    present: list[bool] = images["bytes"].is_valid().to_pylist()
    for row in (row for row, is_there in enumerate(present) if not is_there):
        path = images["path"][row].as_py()
        present[row] = path is not None and folder.joinpath(path).is_file()
    return present


def _names(splits: "dict[str, Dataset]", paths: list[str | None]) -> list[str]:
    """What the images are called: file names where all differ within their split, otherwise row numbers."""
    prefixes = [f"{split}/" if split else "" for split, data in splits.items() for _ in range(data.num_rows)]
    files = [(path or "").replace("\\", "/").rpartition("/")[2] for path in paths]
    by_file = [prefix + file for prefix, file in zip(prefixes, files, strict=True)]
    if all(files) and len(set(by_file)) == len(by_file):
        return by_file
    numbers = [number for data in splits.values() for number in range(data.num_rows)]
    return [f"{prefix}{number:06d}" for prefix, number in zip(prefixes, numbers, strict=True)]


# Columns


class _Columns:
    """Columns over all splits, found by name or by type."""

    def __init__(self, folder: Path, splits: "dict[str, Dataset]") -> None:
        self.folder = folder
        self.splits = splits
        self.features = next(iter(splits.values())).features
        different = [name for name, data in splits.items() if data.features != self.features]
        if different:
            raise DataError(
                f"data.root: expected the same columns and classes in all splits of '{folder}', found others in "
                f"'{different[0]}'; cast the splits to the same features."
            )

    def image(self, wish: str) -> str:
        from datasets import Image, Value

        images = [name for name, kind in self.features.items() if isinstance(kind, Image)]
        plain = [Value(dtype) for dtype in ("binary", "large_binary", "string", "large_string")]
        fitting = [name for name, kind in self.features.items() if name in images or kind in plain]
        return self._choose("image_column", wish, images, fitting, ("image", "img"))

    def label(self, wish: str) -> str:
        from datasets import ClassLabel

        inner = {name: _inner(kind) for name, kind in self.features.items()}
        named = [name for name, kind in inner.items() if isinstance(kind, ClassLabel)]
        fitting = [name for name, kind in inner.items() if name in named or _is_text_or_whole(kind)]
        return self._choose("label_column", wish, named, fitting, ("label", "labels"))

    def _choose(self, setting: str, wish: str, likely: list[str], fitting: list[str], usual: tuple[str, ...]) -> str:
        """The column wished for; ``auto``: the only likely one, or the only one with a usual name."""
        if wish in fitting:
            return wish
        candidates = [likely, [name for name in fitting if name in usual]] if wish == "auto" else []
        for names in candidates:
            if len(names) == 1:
                return names[0]
        near = difflib.get_close_matches(wish, fitting, n=1)
        hint = f" did you mean '{near[0]}'?" if near else ""
        there = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in self.features.items())
        raise DataError(
            f"data.{setting}: expected {'one column that fits' if wish == 'auto' else f'a column {wish!r} that fits'} "
            f"in '{self.folder}', found {there};{hint} Name the column with data.{setting}."
        )

    def text(self, column: str, setting: str) -> list[str]:
        """Values as text, nothing for null."""
        self._choose(setting, column, [], [name for name, kind in self.features.items() if _is_scalar(kind)], ())
        parts = [column_as_text(data.data.column(column)) for data in self.splits.values()]
        return [value for part in parts if part is not None for value in part]

    def classes(self, column: str) -> list[list[str]]:
        """Class names of every image; an empty one where there is no class."""
        rows = [value for data in self.splits.values() for value in data.data.column(column).to_pylist()]
        names = getattr(_inner(self.features[column]), "names", None)
        if not _is_list(self.features[column]):
            return [[_class_name(row, names)] for row in rows]
        return [[name for value in row or [] if (name := _class_name(value, names))] for row in rows]

    def require(self, present: Sequence[bool], names: Sequence[str], setting: str, column: str, what: str) -> None:
        missing = [name for name, is_there in zip(names, present, strict=True) if not is_there]
        if missing:
            more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            raise DataError(
                f"data.{setting}: expected {what} in column '{column}' of every row in '{self.folder}', found none for "
                f"{missing[0]}{more}; remove such rows with Dataset.filter."
            )


def _is_list(kind: Any) -> bool:
    from datasets import LargeList, List

    return isinstance(kind, (List, LargeList))


def _inner(kind: Any) -> Any:
    return kind.feature if _is_list(kind) else kind


def _is_text_or_whole(kind: Any) -> bool:
    dtype = str(getattr(kind, "dtype", ""))
    return type(kind).__name__ == "Value" and (dtype in ("string", "large_string", "bool") or "int" in dtype)


def _is_scalar(kind: Any) -> bool:
    return _is_text_or_whole(kind) or "float" in str(getattr(kind, "dtype", "")) or hasattr(kind, "names")


def _class_name(value: Any, names: Sequence[str] | None) -> str:
    """Nothing for null, and for a number that stands for no class (-1 is used for unlabelled images)."""
    if value is None:
        return ""
    if names is not None:
        return names[value].strip() if 0 <= value < len(names) else ""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()
