"""Images divided as a file says: that of an earlier run, or a person's own."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from pyarrow import Table, parquet

from datamodules.division import Division
from datamodules.table import Listing
from tests.listed import (
    LISTINGS,
    listing_of,
    refusal,
)

AWKWARD = [
    "a,b.png",
    'say "x".png',
    "two\nlines.png",
    "çé 日本.png",
    " blank.png",
    "crlf\r\n.png",
    "'",
    "x;y.png",
    "#.png",
]


def write(file: Path, rows: Sequence[dict[str, str]], ending: str = "\r\n", encoding: str = "utf-8") -> str:
    with file.open("w", newline="", encoding=encoding) as lines:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator=ending)
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


@pytest.fixture
def listing() -> Listing:
    return listing_of("ab" * 9, paths=[*AWKWARD, *(f"d/{row}.png" for row in range(9))])


@pytest.mark.parametrize(("ending", "encoding"), [("\n", "utf-8"), ("\r\n", "utf-8-sig")])
def test_the_split_file_of_a_run_makes_the_same_table(tmp_path, listing, ending, encoding):
    table = Division(seed=4).divide(listing)
    file = write(tmp_path / "split.csv", table.named_rows()[::-1], ending, encoding)
    again = Division(split_file=file).divide(listing)
    assert again.splits == table.splits
    assert again.digest == table.digest
    assert not again.split_is_ours
    assert Division(split_file=file, val_fraction=7.0).divide(listing).digest == table.digest, "fractions play no part"


@pytest.mark.parametrize("name", ["groups", "several classes", "several classes in groups"])
def test_groups_and_several_classes_come_back_from_a_split_file(tmp_path, name):
    table = Division(fold="2 of 3").divide(LISTINGS[name])
    file = write(tmp_path / "split.csv", table.named_rows())
    assert Division(split_file=file).divide(LISTINGS[name]).digest == table.digest


def test_a_split_file_in_parquet(tmp_path, listing):
    table = Division().divide(listing)
    rows = pd.DataFrame(table.named_rows()).astype({"bytes": "int64", "split": "category"}).assign(note=None)
    rows.to_parquet(tmp_path / "split.parquet")
    assert Division(split_file=str(tmp_path / "split.parquet")).divide(listing).digest == table.digest
    rows["bytes"] = rows["bytes"].where(rows.index != 3).astype("Int64")
    parquet.write_table(Table.from_pandas(rows).replace_schema_metadata(None), tmp_path / "SPLIT.PARQUET")
    assert Division(split_file=str(tmp_path / "SPLIT.PARQUET")).divide(listing).digest == table.digest
    rows.loc[5, "bytes"] = 7
    rows.to_parquet(tmp_path / "split.parquet")
    assert "found 7;" in refusal(listing, split_file=str(tmp_path / "split.parquet"))


def test_a_split_file_overrides_given_splits_and_needs_path_and_split_alone(tmp_path):
    names = ["train", " Valid ", "VALIDATION", "val", "Test", "train"]
    rows = [{"split": name, "notes": "", "path": f"{row:06d}.png"} for row, name in enumerate(names)]
    listing = listing_of("ababab", ["test"] * 6)
    file = write(tmp_path / "own.csv", rows)
    assert Division(split_file=file).divide(listing).splits == ["train", "val", "val", "val", "test", "train"]


def test_classes_of_an_image_may_be_in_any_order_in_a_split_file(tmp_path):
    listing = listing_of(["a|b", "b", "", "a"], ["train", "train", "val", "test"], separator="|")
    rows = Division().divide(listing).named_rows()
    rows[0]["label"] = "b | a"
    assert Division(split_file=write(tmp_path / "split.csv", rows)).divide(listing).splits[0] == "train"
    rows[0]["label"] = "b"
    assert "the label of '000000.png', 'a|b'," in refusal(listing, split_file=write(tmp_path / "split.csv", rows))


def changed(rows: list[dict[str, str]], row: int, **cells: str) -> list[dict[str, str]]:
    return [{**named, **cells} if number == row else named for number, named in enumerate(rows)]


def test_a_split_file_need_not_name_validation_images(tmp_path, listing):
    table = Division(val_fraction=0).divide(listing)
    again = Division(split_file=write(tmp_path / "split.csv", table.named_rows())).divide(listing)
    assert len(again.rows("val")) == 0
    assert again.digest == table.digest


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda rows: rows[:-2], "found 2 images without a row ('d/7.png', 'd/8.png') and 0 rows without an image;"),
        (lambda rows: rows[:8], "found 10 images without a row ('#.png', 'd/0.png', 'd/1.png' and 7 more) and 0 rows"),
        (lambda rows: [*rows, {**rows[0], "path": "other.png"}], "and 1 rows without an image ('other.png');"),
        (
            lambda rows: changed(rows, 0, path="A"),
            "1 images without a row ('a,b.png') and 1 rows without an image ('A')",
        ),
        (lambda rows: [*rows, rows[1]], "expected one row for each image in"),
        (lambda rows: [*rows, rows[2]], r"found 'two\nlines.png' twice; remove a row."),
        (lambda rows: changed(rows, 3, label="a"), "expected the label of 'çé 日本.png', 'b', in"),
        (lambda rows: changed(rows, 3, label="a"), "found 'a';"),
        (lambda rows: changed(rows, 4, bytes="7"), "expected the size of ' blank.png', 104 bytes, in"),
        (lambda rows: changed(rows, 4, split="tset"), "train, val or test for ' blank.png' in"),
        (lambda rows: changed(rows, 4, split="tset"), "found 'tset'; did you mean test?"),
        (lambda rows: changed(rows, 4, split=""), "found ''; name one of them."),
        (lambda rows: [{**row, "split": "train"} for row in rows], "images in each of train and test in"),
        (lambda rows: [{("Split" if k == "split" else k): v for k, v in r.items()} for r in rows], "mean 'Split'?"),
        (lambda rows: [{"image": r["path"], "set": r["split"]} for r in rows], "found 'image' and 'set'; name it in"),
    ],
)
def test_a_split_file_of_other_images_is_refused(tmp_path, listing, change, text):
    file = write(tmp_path / "split.csv", change(Division().divide(listing).named_rows()))
    message = refusal(listing, split_file=file)
    assert text in message
    assert message.startswith("data.split_file: expected ")
    assert file in message


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("split.csv", b"", "expected one column 'path'"),
        ("split.csv", b"path,split,split\nx,train,test\n", "expected one column 'split'"),
        ("split.csv", b"path;split\nx;train\n", "found 'path;split'; "),
        ("split.csv", b"path,split\nx,train,y\n", "expected 2 cells in every row"),
        ("split.csv", b"path,split\nx\n", "found 1 in row 2"),
        ("split.csv", b'path,split\n"x,train\n', "what cannot be read"),
        ("split.csv", "path,split\nx,train\n".encode("utf-16"), "save it as CSV in UTF-8 or as Parquet"),
        ("split.parquet", b"path,split\n", "what cannot be read"),
        ("split.xlsx", b"", "expected a .csv or .parquet file, found '"),
    ],
)
def test_a_split_file_that_cannot_be_read_is_refused(tmp_path, listing, name, content, text):
    (tmp_path / name).write_bytes(content)
    message = refusal(listing, split_file=str(tmp_path / name))
    assert text in message
    assert name in message


def test_a_split_file_that_is_not_there_is_named(tmp_path, listing):
    assert re.search(r"found nothing at '.*absent\.csv'", refusal(listing, split_file=str(tmp_path / "absent.csv")))
    assert "found nothing at" in refusal(listing, split_file=str(tmp_path))


def test_a_split_file_in_the_home_folder(tmp_path, listing, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "split.csv", Division().divide(listing).named_rows())
    assert Division(split_file="~/split.csv").divide(listing).splits == Division().divide(listing).splits


def test_a_split_file_and_a_fold_are_refused_together(tmp_path, listing):
    file = write(tmp_path / "split.csv", Division().divide(listing).named_rows())
    assert "expected at most one of them" in refusal(listing, split_file=file, fold="1 of 3")
