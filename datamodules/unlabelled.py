"""Images without labels, listed as they are asked for: there may be more of them than anyone wants in memory."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.errors import DataError
from datamodules.table import walk_images

_PATH = "path"
_ROWS = 10_000  # of a Parquet file, read at once


@dataclass(frozen=True)
class UnlabelledImages:
    """Paths of images, relative to a root, in an order that stays the same; each iteration reads them anew.

    Attributes:
        source: a folder with images anywhere below it, or a CSV or Parquet file with a column ``path``.
        root: the folder that the paths start from: the source, or the folder of the file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "new.csv").write_text("path\\nb.png\\na.png\\n")
        ...     list(UnlabelledImages.of(f"{folder}/new.csv"))
        ['b.png', 'a.png']
    """

    source: Path
    root: Path

    @classmethod
    def of(cls, path: str) -> "UnlabelledImages":
        """From what a person gives.

        Raises:
            DataError: there is no such folder or file.
        """
        source = Path(path).expanduser().resolve()
        if source.is_dir():
            return cls(source, source)
        if source.is_file() and source.suffix.lower() in (".csv", ".parquet"):
            return cls(source, source.parent)
        found = f"'{source}'" if source.exists() else f"nothing at '{source}'"
        raise DataError(
            f"data.predict_path: expected a folder of images, or a CSV or Parquet file with a column {_PATH}, "
            f"found {found}."
        )

    def __iter__(self) -> Iterator[str]:
        found = False
        for path in self._paths():
            found = True
            yield path
        if not found:
            raise DataError(f"data.predict_path: expected images in '{self.source}', found none.")

    def _paths(self) -> Iterator[str]:
        if self.source.is_dir():
            return walk_images(self.source)
        return self._from_parquet() if self.source.suffix.lower() == ".parquet" else self._from_csv()

    def _from_csv(self) -> Iterator[str]:
        try:
            with self.source.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                self._require_path(reader.fieldnames or [])
                for row in reader:
                    yield row[_PATH] or ""  # which is no image, and is told as such
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._unreadable("rows of separated values in UTF-8", error) from error

    def _from_parquet(self) -> Iterator[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.source) as file:
                self._require_path(file.schema_arrow.names)
                for batch in file.iter_batches(_ROWS, columns=[_PATH]):
                    yield from (path or "" for path in batch.column(0).cast(pa.string()).to_pylist())
        except pa.ArrowException as error:
            raise self._unreadable("Parquet with paths as text", error) from error

    def _unreadable(self, expected: str, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(f"data.predict_path: expected {expected} in '{self.source}', found something else ({reason}).")

    def _require_path(self, columns: Sequence[str]) -> None:
        if _PATH not in columns:
            found = ", ".join(columns) or "none"
            raise DataError(
                f"data.predict_path: expected a column {_PATH} in '{self.source}', found {found}; "
                "name the column of the images' paths so."
            )
