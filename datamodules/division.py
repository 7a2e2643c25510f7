"""Which images are trained on, which ones validate, and which ones test."""

import csv
import difflib
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.splits import SPLIT_NAMES, grouped_split, stratified_folds, stratified_split
from datamodules.table import ImageTable, Listing

#: Share of the undivided images that validates, unless somebody says otherwise.
VAL_FRACTION = 0.1


@dataclass(frozen=True)
class Division:
    """How the images of a listing are divided.

    Splits that the data brings are kept; the others are drawn from its training images, stratified by class and
    seeded. Where images have groups, a drawn split shares no group with any other; a group of which some images came
    in ``val`` or ``test`` keeps the rest in training. Few groups leave few good divisions: several seeds may come to
    the same one.

    Attributes:
        val_fraction: share of the undivided images that validates, in [0, 1), where the data brings no ``val``.
        test_fraction: share of the undivided images that tests, in (0, 1), where the data brings no ``test``.
        seed: of what is drawn, 0 or more.
        fold: ``i of k``: the undivided images are cut into k parts, the same ones for every i, and part i tests.
        split_file: CSV or Parquet file with the columns ``path`` and ``split``, a row for every image: the
            ``split.csv`` of an earlier run, or a person's own.
        group_pattern: regular expression that finds the group of an image in its path, where the data names none
            (see :func:`group_keys`).

    Example:
        >>> from datamodules.storage import FileStorage
        >>> paths = [f"{label}/{i}.png" for label in ("cat", "dog") for i in range(10)]
        >>> labels = ["cat"] * 10 + ["dog"] * 10
        >>> listing = Listing(FileStorage(Path("."), paths), paths, labels, given=[None] * 20)
        >>> table = Division(val_fraction=0.2, test_fraction=0.3).divide(listing)
        >>> [sorted(table.counts(split).items()) for split in ("train", "val", "test")]
        [[('cat', 5), ('dog', 5)], [('cat', 2), ('dog', 2)], [('cat', 3), ('dog', 3)]]
        >>> table = Division(val_fraction=0.2, fold="1 of 5").divide(listing)
        >>> [len(table.rows(split)) for split in ("train", "val", "test")]
        [12, 4, 4]
    """

    val_fraction: float = VAL_FRACTION
    test_fraction: float = 0.2
    seed: int = 0
    fold: str | None = None
    split_file: str | None = None
    group_pattern: str | None = None

    def divide(self, listing: Listing) -> ImageTable:
        """Give every image its split.

        Raises:
            DataError: the settings contradict each other or the data, there is too little of a class or of groups, or
                the split file is not one of these images.
        """
        if self.group_pattern is not None:
            listing = _grouped_by_name(listing, self.group_pattern)
        if self.split_file is not None:
            if self.fold is not None:
                raise DataError("data.fold and data.split_file: expected at most one of them, found both; remove one.")
            splits = read_split_file(Path(self.split_file).expanduser(), listing)
            return ImageTable(listing, splits, split_is_ours=False)
        if not 0 <= self.val_fraction < 1:
            raise DataError(f"data.val_fraction: expected a share from 0 to below 1, found {self.val_fraction}.")
        if not 0 < self.test_fraction < 1:
            raise DataError(f"data.test_fraction: expected a share between 0 and 1, found {self.test_fraction}.")
        given = ["train" if split is None else split for split in listing.given]
        if "train" not in given:
            raise DataError(
                f"data.root: expected images to train on in {listing.storage.location}, found none among the "
                f"{len(given):,} images; add some."
            )
        splits = self._complete(listing, given) if self.fold is None else self._cut(listing, given, self.fold)
        return ImageTable(listing, splits, split_is_ours=splits != given)

    def draws_val(self, listing: Listing) -> bool:
        """Whether it is left to ``val_fraction`` which images validate."""
        return self.split_file is None and "val" not in listing.given

    def _complete(self, listing: Listing, given: list[str]) -> list[str]:
        """Take the splits that the data lacks out of its training images."""
        fractions = {"val": self.val_fraction, "test": self.test_fraction}
        missing = {split: fraction for split, fraction in fractions.items() if split not in given and fraction}
        train_share = 1 - sum(missing.values())
        if train_share <= 0:
            raise DataError(
                f"data.val_fraction and data.test_fraction: expected a sum below 1, found {1 - train_share:g}; lower "
                "one."
            )
        if not missing:
            return given
        purpose = f"to divide among {_enumerated(['train', *missing])}"
        remedies = ("set data.val_fraction to 0",) if "val" in missing else ()
        pool = _Pool(listing, _rows(given, "train"), "data.root", purpose, remedies)
        kept = pool.shared_with(_rows(given, "val", "test"))
        if pool.is_plain:
            pool.require_in_classes(1 + len(missing))
        pool.require_units(len(missing) + (not kept), kept)
        splits = _replaced(given, pool.rows, pool.draw({"train": train_share, **missing}, self.seed, kept))
        pool.require_complete(splits, missing)
        return splits

    def _cut(self, listing: Listing, given: list[str], fold: str) -> list[str]:
        """Cut the undivided images: one part tests, and some of the rest validate where the data brings no ``val``."""
        number, folds = _parse_fold(fold)
        pool = _Pool(listing, _rows(given, "train"), "data.fold", f"to cut into {folds} folds")
        if "test" in given:
            raise DataError(
                f"data.fold: expected data without a test split, since the folds test in turn, found "
                f"{given.count('test'):,} test images in {listing.storage.location}; remove data.fold or the test "
                "split."
            )
        if shared := pool.shared_with(_rows(given, "val")):
            raise DataError(
                f"data.fold: expected groups that are not in the given val split as well, found {len(shared):,}"
                f"{_some(shared)}; remove data.fold or the val split, or put each group on one side."
            )
        drawn = ["test"] if "val" in given or not self.val_fraction else ["val", "test"]
        val_share = self.val_fraction * folds / (folds - 1)  # among the images that do not test
        if "val" in drawn and val_share >= 1:
            raise DataError(
                f"data.val_fraction: expected less than {1 - 1 / folds:g}, which data.fold '{fold}' leaves, found "
                f"{self.val_fraction}; lower it."
            )
        # Beside one of two folds, even the larger one, something has to train and something to validate.
        least = 4 if folds == 2 and "val" in drawn else folds
        pool.require_in_classes(least if pool.is_plain else folds if listing.separator is None else 2)
        pool.require_units(least)
        splits = _replaced(given, pool.rows, np.where(pool.cut(folds, self.seed) == number - 1, "test", "train"))
        if "val" in drawn:
            rest = replace(pool, rows=_rows(splits, "train"))
            splits = _replaced(splits, rest.rows, rest.draw({"train": 1 - val_share, "val": val_share}, self.seed))
        pool.require_complete(splits, drawn)
        return splits


def group_keys(paths: Sequence[str], pattern: str) -> list[str]:
    """The group of each path: what ``(?P<group>...)`` in the pattern stands for, or else its first parentheses, or all.

    A path in which the pattern is not found is a group of its own.

    Raises:
        re.error: the pattern is no regular expression.

    Example:
        >>> group_keys(["a/p1_s1.png", "b/p1_s2.png", "c/other.png"], r"(?P<group>p[0-9]+)_")
        ['p1', 'p1', 'c/other.png']
    """
    compiled = re.compile(pattern)
    part = "group" if "group" in compiled.groupindex else min(compiled.groups, 1)
    found = (compiled.search(path) for path in paths)
    return [path if match is None else match[part] or path for path, match in zip(paths, found, strict=True)]


def _grouped_by_name(listing: Listing, pattern: str) -> Listing:
    if listing.groups is not None:
        raise DataError(
            f"data.group_pattern: expected data that names no groups itself, found groups in "
            f"{listing.storage.location}; remove data.group_pattern, or the groups."
        )
    try:
        groups = group_keys(listing.paths, pattern)
    except re.error as error:
        raise DataError(
            f"data.group_pattern: expected a regular expression, found '{pattern}' ({error}); try it with re.search."
        ) from error
    if groups == listing.paths:
        raise DataError(
            f"data.group_pattern: expected a pattern that is found in paths such as '{groups[0]}', found '{pattern}' "
            f"in none of {len(groups):,}; mind that paths are those below the folder of the data."
        )
    return replace(listing, groups=groups)


def _parse_fold(fold: str) -> tuple[int, int]:
    matched = re.fullmatch(r"\s*([0-9]+)\s+of\s+([0-9]+)\s*", fold)
    if matched is None:
        raise DataError(f"data.fold: expected 'i of k' such as '2 of 5', found '{fold}'.")
    number, folds = int(matched[1]), int(matched[2])
    if folds < 2:
        raise DataError(f"data.fold: expected at least 2 folds, found '{fold}'.")
    if not 1 <= number <= folds:
        raise DataError(f"data.fold: expected one of the folds 1 to {folds}, found '{fold}'.")
    return number, folds


@dataclass(frozen=True)
class _Pool:
    """Images that are to be divided.

    Attributes:
        listing: these images and others.
        rows: which of them.
        setting: what to blame if it cannot be done.
        purpose: what is done.
        remedies: beside what always helps.
    """

    listing: Listing
    rows: list[int]
    setting: str
    purpose: str
    remedies: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether every image has one class and stands alone."""
        return self.listing.groups is None and self.listing.separator is None

    def units(self, rows: Iterable[int]) -> list[Hashable]:
        """What stays together: the group of each image; an image without one stands for itself."""
        groups = self.listing.groups
        return [row if groups is None or not groups[row].strip() else groups[row] for row in rows]

    def shared_with(self, others: list[int]) -> set[Hashable]:
        """Groups that are among other images too."""
        return set(self.units(others)) & set(self.units(self.rows))

    def draw(self, shares: dict[str, float], seed: int, kept: Collection[Hashable] = ()) -> NDArray[np.str_]:
        """The split of each image. Training, which comes first, has every class and the groups that are kept."""
        if self.is_plain:
            return stratified_split(self._strata(), shares, seed)
        return self._grouped(shares, seed, complete="train", kept=kept)

    def cut(self, folds: int, seed: int) -> NDArray[np.int64]:
        """The fold of each image, counted from 0."""
        if self.is_plain:
            return stratified_folds(self._strata(), folds, seed)
        return self._grouped({str(fold): 1 / folds for fold in range(folds)}, seed).astype(np.int64)

    def _strata(self) -> list[str]:
        strata = self.listing.labels if self.listing.strata is None else self.listing.strata
        return [strata[row] for row in self.rows]

    def _grouped(
        self, shares: dict[str, float], seed: int, complete: str | None = None, kept: Collection[Hashable] = ()
    ) -> NDArray[np.str_]:
        classes = [self.listing.classes_of(row) for row in self.rows]
        strata = None if self.listing.strata is None else self._strata()
        return grouped_split(self.units(self.rows), classes, shares, seed, strata=strata, complete=complete, kept=kept)

    def require_in_classes(self, least: int) -> None:
        """Refuse a class in fewer images (groups, where there are any) than that."""
        pairs = zip(self.units(self.rows), self.rows, strict=True)
        counts = Counter(
            name for _, name in {(unit, name) for unit, row in pairs for name in self.listing.classes_of(row)}
        )
        for name, count in sorted(counts.items()):
            if count < least:
                expected = f"at least {self._counted(least)} of class '{name}'"
                raise self._refusal(expected, f"{count}", "remove the class")

    def require_units(self, least: int, kept: Collection[Hashable] = ()) -> None:
        """Refuse fewer images (groups, where there are any) than that, beside those that are kept."""
        count = len(set(self.units(self.rows)).difference(kept))
        if count < least:
            are = "is" if least == 1 else "are"
            beside = f" that {are} in no given split" if kept else ""
            raise self._refusal(f"at least {self._counted(least)}{beside}", f"{count}")

    def require_complete(self, splits: list[str], drawn: Collection[str]) -> None:
        """Refuse a split without images and a training split that lacks a class."""
        for split in drawn:
            if all(splits[row] != split for row in self.rows):
                raise self._refusal(
                    f"enough {self._noun}", f"none that training could spare for {split} without losing a class"
                )
        trained = {name for row in self.rows if splits[row] == "train" for name in self.listing.classes_of(row)}
        lacking = sorted({name for row in self.rows for name in self.listing.classes_of(row)} - trained)
        if lacking:
            expected = f"enough {self._noun} of class '{lacking[0]}'"
            raise self._refusal(expected, "none left for training", "remove the class")

    @property
    def _noun(self) -> str:
        return "images" if self.listing.groups is None else "groups"

    def _counted(self, count: int) -> str:
        return f"{count} {self._noun if count > 1 else self._noun.removesuffix('s')}"

    def _refusal(self, expected: str, found: str, *remedies: str) -> DataError:
        fewer = ["use fewer folds"] if self.setting == "data.fold" else []
        return DataError(
            f"{self.setting}: expected {expected} {self.purpose}, found {found} in {self.listing.storage.location}; "
            f"{_enumerated([*fewer, f'add {self._noun}', *remedies, *self.remedies], 'or')}."
        )


def read_split_file(file: Path, listing: Listing) -> list[str]:
    """The split of each image of a listing, as a file has it.

    Args:
        file: CSV (in UTF-8) or Parquet with the columns ``path`` and ``split`` and a row for each image. Where it has
            ``label`` and ``bytes``, they must be those of the image; other columns are passed over.
        listing: the images.

    Returns:
        ``train``, ``val`` or ``test`` for each image; the file may say ``valid`` or ``validation``, in any case.

    Raises:
        DataError: the file cannot be read, or is not one of these images.
    """
    rows: dict[str, dict[str, str]] = {}
    for row in _read_rows(file):
        if row["path"] in rows:
            raise _mismatch(file, "one row for each image", f"{row['path']!r} twice", "remove a row")
        rows[row["path"]] = row
    without_row = [path for path in listing.paths if path not in rows]
    without_image = sorted(rows.keys() - set(listing.paths))
    if without_row or without_image:
        raise _mismatch(
            file,
            f"a row for each of the {len(listing.paths):,} images in {listing.storage.location} and no other",
            f"{len(without_row):,} images without a row{_some(without_row)} and {len(without_image):,} rows without an "
            f"image{_some(without_image)}",
            "give the file that belongs to these images, or correct its paths",
        )
    ordered = [rows[path] for path in listing.paths]
    _require_same_images(file, ordered, listing)
    splits = [_split_of(file, row) for row in ordered]
    for split in ("train", "test"):  # few images have none to spare for val
        if split not in splits:
            raise _mismatch(file, "images in each of train and test", f"none in {split}", f"move some to {split}")
    return splits


def _require_same_images(file: Path, rows: list[dict[str, str]], listing: Listing) -> None:
    theirs = replace(listing, labels=[row.get("label", label) for row, label in zip(rows, listing.labels, strict=True)])
    for number, row in enumerate(rows):
        if set(theirs.classes_of(number)) != set(listing.classes_of(number)):
            expected = f"the label of {row['path']!r}, {listing.labels[number]!r},"
            raise _mismatch(file, expected, f"{row['label']!r}", "correct the one that is wrong")
        if row.get("bytes") and row["bytes"] != str(size := listing.storage.size(number)):
            expected = f"the size of {row['path']!r}, {size} bytes,"
            raise _mismatch(file, expected, f"{row['bytes']}", "restore the image, or leave the column 'bytes' out")


def _split_of(file: Path, row: dict[str, str]) -> str:
    name = row["split"].strip().lower()
    if name not in SPLIT_NAMES:
        close = difflib.get_close_matches(name, SPLIT_NAMES, n=1)
        remedy = f"did you mean {close[0]}?" if close else "name one of them"
        raise _mismatch(file, f"train, val or test for {row['path']!r}", f"{row['split']!r}", remedy)
    return SPLIT_NAMES[name]


def _read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV or Parquet file, by column."""
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(file.suffix.lower())
    if reader is None or not file.is_file():
        what = f"'{file}'" if file.is_file() else f"nothing at '{file}'"
        raise DataError(f"data.split_file: expected a .csv or .parquet file, found {what}; correct the path.")
    try:
        header, *rows = reader(file)
    except (OSError, ValueError, ImportError, csv.Error) as error:
        raise _mismatch(
            file, "rows", f"what cannot be read ({error})", "save it as CSV in UTF-8 or as Parquet"
        ) from error
    for name in ("path", "split"):
        if header.count(name) != 1:
            close = difflib.get_close_matches(name, header, n=1)
            remedy = f"did you mean '{close[0]}'?" if close else "name it in the first row, with commas between columns"
            raise _mismatch(file, f"one column '{name}'", _enumerated([f"'{name}'" for name in header]), remedy)
    for number, cells in enumerate(rows, start=2):
        if len(cells) != len(header):
            raise _mismatch(file, f"{len(header)} cells in every row", f"{len(cells)} in row {number}", "correct it")
    return [dict(zip(header, cells, strict=True)) for cells in rows]


def _read_csv(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return [cells for cells in csv.reader(lines, strict=True) if cells] or [[]]


def _read_parquet(file: Path) -> list[list[str]]:
    import pandas  # heavy, and needed for this alone

    frame = pandas.read_parquet(file, dtype_backend="numpy_nullable")  # whole numbers stay whole where cells are empty
    cells = frame.astype(object).where(frame.notna(), "")
    return [list(frame.columns), *([str(cell) for cell in row] for row in cells.itertuples(index=False))]


def _mismatch(file: Path, expected: str, found: str, remedy: str) -> DataError:
    ending = "" if remedy.endswith("?") else "."
    return DataError(f"data.split_file: expected {expected} in '{file}', found {found}; {remedy}{ending}")


def _rows(splits: list[str], *wanted: str) -> list[int]:
    return [row for row, split in enumerate(splits) if split in wanted]


def _replaced(splits: list[str], rows: list[int], names: NDArray[np.str_]) -> list[str]:
    """Splits with those of some rows replaced."""
    replaced = list(splits)
    for row, name in zip(rows, names.tolist(), strict=True):
        replaced[row] = name
    return replaced


def _enumerated(names: Sequence[str], conjunction: str = "and") -> str:
    return ", ".join([*names[:-2], f" {conjunction} ".join(names[-2:])])


def _some(names: Collection[object]) -> str:
    """The first three in brackets, and how many others there are; nothing of none."""
    shown = ", ".join(repr(name) for name in sorted(names, key=str)[:3])
    return f" ({shown}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''})" if names else ""
