"""Images listed in a table: a CSV or Parquet file with a row for each."""

import csv
import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from datamodules.errors import DataError
from datamodules.splits import SPLIT_NAMES
from datamodules.storage import FileStorage, require_inside
from datamodules.table import Listing

if TYPE_CHECKING:
    import pyarrow as pa

_OPTIONAL = {"split_column": "split", "group_column": "group", "weight_column": "weight"}
_TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
_PARQUET_SUFFIXES = (".parquet", ".pq")


def read_manifest(
    manifest: Path,
    root: Path | None = None,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str = "split",
    group_column: str = "group",
    weight_column: str = "weight",
    separator: str | None = None,
) -> Listing:
    """Images and what is known of them, from a table with a header.

    Columns ``path`` and ``label`` are needed; ``split``, ``group`` and ``weight`` are used where they are there (those
    given another name than the default one must be there). Column names count in any case, spaces around values do not
    count, and the other columns become metadata. A label is text, exactly as written: ``007`` stays ``007``.

    Args:
        manifest: CSV (UTF-8; separated by commas, semicolons or tabs, as its header shows) or Parquet, by its suffix.
        root: folder that the paths are relative to; None: the manifest's own.
        path_column: of the files; relative, or absolute and inside the root; backslashes count as slashes.
        label_column: of the classes.
        split_column: of train, val (valid, validation) and test, in any case; blank: to be divided.
        group_column: of what must not be on both sides of a split; blank: the image on its own.
        weight_column: of weights in the training loss, finite and above 0.
        separator: between the classes of one image, any number of them; None: each has exactly one class.

    Raises:
        DataError: names file, row (the header is row 1) and value of the first mistake, and counts the others.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.png").write_bytes(b""), (folder / "b.png").write_bytes(b"")
        >>> _ = (folder / "images.csv").write_text("path;label;split\\na.png;cat;Train\\nb.png;dog;\\n")
        >>> listing = read_manifest(folder / "images.csv")
        >>> listing.labels, listing.given
        (['cat', 'dog'], ['train', None])
    """
    table = _read_table(manifest)
    wanted = {
        "path_column": path_column,
        "label_column": label_column,
        "split_column": split_column,
        "group_column": group_column,
        "weight_column": weight_column,
    }
    found = {setting: name for setting, wish in wanted.items() if (name := table.find(wish, setting)) is not None}
    columns = {setting: table.columns[name] for setting, name in found.items()}
    folder = (manifest.parent if root is None else root).expanduser()
    paths = _relative_paths(columns["path_column"], folder)
    labels = columns["label_column"]
    splits = columns.get("split_column")
    weights = columns.get("weight_column")
    table.require_none_of(
        chain(
            _wrong_paths(paths, table.numbers),
            _missing_labels(labels) if separator is None else (),
            _unknown_splits(splits) if splits is not None else (),
            _wrong_weights(weights) if weights is not None else (),
        )
    )
    resolved = folder.resolve()
    require_inside(resolved, paths, "data.manifest" if root is None else "data.root")
    metadata = {name: values for name, values in table.columns.items() if name not in found.values()}
    return Listing(
        storage=FileStorage(resolved, paths),
        paths=paths,
        labels=labels,
        given=[None] * len(paths) if splits is None else [SPLIT_NAMES.get(split.lower()) for split in splits],
        groups=columns.get("group_column"),
        weights=None if weights is None else [as_weight(weight) for weight in weights],
        separator=separator,
        metadata=metadata or None,
    )


def column_as_text(column: "pa.ChunkedArray") -> list[str] | None:
    """The values of an Arrow column as people write them: ``7`` for 7 and for 7.0, ``true``, nothing for null.

    None for a column of anything but text, numbers and truth values.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), None, column)
        exact = column.cast(pa.float64())
        whole = pc.and_(pc.equal(exact, pc.round(exact)), pc.less(pc.abs(exact), 2.0**53))
        column = exact.cast(pa.int64()) if pc.all(whole).as_py() else column
    elif not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        return None
    text: list[str] = pc.utf8_trim_whitespace(pc.fill_null(column.cast(pa.string()), "")).to_pylist()
    return text


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def as_weight(text: str) -> float:
    """A finite number above 0; NaN if it is none.

    Example:
        >>> as_weight("0.5"), as_weight("0"), as_weight("much")
        (0.5, nan, nan)
    """
    try:
        weight = float(text)
    except ValueError:
        return math.nan
    return weight if 0 < weight < math.inf else math.nan


# Tables

# Index of a row and what is wrong with it.
_Mistake = tuple[int, str]


@dataclass(frozen=True)
class _Table:
    """Columns of text without spaces around values, the number of each row as people count, and other columns."""

    file: Path
    columns: dict[str, list[str]]
    numbers: Sequence[int]
    unreadable: dict[str, str] = field(default_factory=dict)

    def find(self, name: str, setting: str) -> str | None:
        """The column of that name, in any case; None where it need not be there."""
        alike = [column for column in self.columns if column.lower() == name.lower()]
        if name in self.columns or len(alike) == 1:
            return name if name in self.columns else alike[0]
        if name in self.unreadable:
            raise DataError(
                f"data.{setting}: expected text or numbers in column '{name}' of {self.file}, found "
                f"{self.unreadable[name]}; write it as text."
            )
        if name == _OPTIONAL.get(setting):
            return None
        near = difflib.get_close_matches(name, self.columns, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ";"
        raise DataError(
            f"data.{setting}: expected a column '{name}' in {self.file}, found {', '.join(map(repr, self.columns))}"
            f"{hint} Name the column with data.{setting}."
        )

    def require_none_of(self, mistakes: Iterable[_Mistake]) -> None:
        """Refuse a table with wrong rows: tell the first and the number."""
        found = sorted(mistakes)
        if found:
            row, text = found[0]
            raise _wrong_row(self.file, self.numbers[row], text, len({row for row, _ in found}))


def _wrong_row(file: Path, number: int, text: str, count: int) -> DataError:
    more = f" (wrong rows in all: {count:,})" if count > 1 else ""
    return DataError(f"data.manifest: {file}, row {number:,}: {text}{more}; correct the file.")


def _read_table(file: Path) -> _Table:
    if not file.is_file():
        raise DataError(f"data.manifest: expected a CSV or Parquet file, found none at '{file}'; correct the path.")
    suffix = file.suffix.lower()
    if suffix in _TEXT_SUFFIXES:
        table = _read_text(file)
    elif suffix in _PARQUET_SUFFIXES:
        table = _read_parquet(file)
    else:
        suffixes = ", ".join(_TEXT_SUFFIXES + _PARQUET_SUFFIXES)
        raise DataError(f"data.manifest: expected a file that ends in one of {suffixes}, found '{file}'.")
    if not table.numbers:
        raise DataError(f"data.manifest: expected a row for each image in {file}, found none; add rows.")
    return table


def _read_text(file: Path) -> _Table:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            reader = csv.reader(chain([first], lines), delimiter=_delimiter(first), skipinitialspace=True, strict=True)
            records = [[value.strip() for value in record] for record in reader]
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.manifest: expected text in UTF-8, found other bytes in {file} ({error.reason}); save it as UTF-8."
        ) from error
    except csv.Error as error:
        raise DataError(
            f"data.manifest: expected rows of separated values in {file}, found a broken one ({error}); correct its "
            "quotation marks."
        ) from error
    header = records[0] if records else []
    numbers = [number for number, record in enumerate(records[1:], 2) if any(record)]  # blank lines are no rows
    rows = [records[number - 1] for number in numbers]
    ragged = [index for index, row in enumerate(rows) if len(row) != len(header)]
    if ragged:
        text = f"expected {len(header)} values, as many as the header has, found {len(rows[ragged[0]])}"
        raise _wrong_row(file, numbers[ragged[0]], text, len(ragged))
    columns = [list(column) for column in zip(*rows, strict=True)]
    _require_different(header, file)
    return _Table(file, {name: column for name, column in zip(header, columns, strict=False) if name}, numbers)


def _delimiter(header: str) -> str:
    """The most frequent of comma, semicolon and tab outside quotation marks."""
    bare = "".join(header.split('"')[::2])
    return max(",;\t", key=bare.count)


def _read_parquet(file: Path) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"data.manifest: expected a Parquet file, found {file}, which cannot be read ({error}); write it again."
        ) from error
    _require_different(table.column_names, file)
    columns = {name: column_as_text(table[name]) for name in table.column_names}
    return _Table(
        file,
        {name: column for name, column in columns.items() if column is not None},
        range(2, 2 + table.num_rows),
        {name: str(table[name].type) for name, column in columns.items() if column is None},
    )


def _require_different(header: Sequence[str], file: Path) -> None:
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise DataError(f"data.manifest: expected a name once in the header of {file}, found '{twice[0]}' again.")


# Columns


def _relative_paths(paths: list[str], folder: Path) -> list[str]:
    """With forward slashes, and relative to the folder where they are inside it."""
    roots = [f"{root.as_posix().rstrip('/')}/" for root in (folder.absolute(), folder.resolve())]
    relative = []
    for text in paths:
        path = text.replace("\\", "/")
        for root in roots:
            path = path.removeprefix(root)
        if path and ("//" in path or "./" in path):
            path = PurePosixPath(path).as_posix()
        relative.append(path)
    return relative


def _wrong_paths(paths: list[str], numbers: Sequence[int]) -> Iterator[_Mistake]:
    if len(set(paths)) == len(paths) and "" not in paths:
        return
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        if not path:
            yield row, "expected a path, found none"
        elif first.setdefault(path, row) != row:
            yield row, f"expected every path once, found '{path}' of row {numbers[first[path]]:,} again"


def _missing_labels(labels: list[str]) -> Iterator[_Mistake]:
    return ((row, "expected a label, found none") for row, label in enumerate(labels) if not label)


def _unknown_splits(splits: list[str]) -> Iterator[_Mistake]:
    for row, split in enumerate(splits):
        if split and split.lower() not in SPLIT_NAMES:
            yield row, f"expected train, val or test as the split, or nothing, found '{split}'"


def _wrong_weights(weights: list[str]) -> Iterator[_Mistake]:
    for row, text in enumerate(weights):
        if math.isnan(as_weight(text)):
            yield row, f"expected a weight above 0, found '{text}'"
