"""Images listed in a CSV or Parquet file."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.errors import DataError
from datamodules.manifest import read_manifest
from datamodules.storage import FileStorage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files a.png to f.png, and b.png again in a folder below."""
    root = tmp_path / "images"
    (root / "sub dir").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "sub dir/b.png"):
        (root / name).write_bytes(name.encode())
    return root


def csv(folder: Path, text: str, name: str = "list.csv", encoding: str = "utf-8") -> Path:
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def complaint(manifest: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_manifest(manifest, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data.")
    return message


# What is read


def test_a_whole_manifest(folder):
    listing = read_manifest(
        csv(
            folder,
            "path,label,split,group,weight,camera,note\n"
            "a.png,cat,train,p1,0.5,left,\n"
            "b.png,dog,VAL,p1,2,right,dark\n"
            "sub dir/b.png,dog,Validation,p2,1e-3,left,\n"
            "c.png,cat,valid,,1,left,\n"
            "d.png,cat,test,p3,1,,\n"
            "e.png,dog,,p3,1,left,\n",
        )
    )
    assert listing.paths == ["a.png", "b.png", "sub dir/b.png", "c.png", "d.png", "e.png"]
    assert listing.labels == ["cat", "dog", "dog", "cat", "cat", "dog"]
    assert listing.given == ["train", "val", "val", "val", "test", None]
    assert listing.groups == ["p1", "p1", "p2", "", "p3", "p3"]
    assert listing.weights == [0.5, 2.0, 0.001, 1.0, 1.0, 1.0]
    assert listing.metadata == {
        "camera": ["left", "right", "left", "left", "", "left"],
        "note": ["", "dark", "", "", "", ""],
    }
    assert listing.separator is None
    assert isinstance(listing.storage, FileStorage)
    assert listing.storage.location == str(folder)
    assert [Path(listing.storage.source(row)).read_bytes().decode() for row in range(6)] == listing.paths
    assert listing.storage.size(2) == len("sub dir/b.png")


def test_only_path_and_label_are_needed(folder):
    listing = read_manifest(csv(folder, "label,path\ncat,a.png\ndog,b.png\n"))
    assert (listing.paths, listing.labels, listing.given) == (["a.png", "b.png"], ["cat", "dog"], [None, None])
    assert (listing.groups, listing.weights, listing.metadata) == (None, None, None)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_spreadsheets_write_csv_in_many_ways(folder, separator, end, encoding):
    rows = [["path", "label", "remark"], ["a.png", "Grün", '"a, b; c\tand ""d"""'], ["b.png", "  blue  ", ""]]
    text = end.join(f"{separator} ".join(row) if separator != "\t" else separator.join(row) for row in rows) + end + end
    listing = read_manifest(csv(folder, text, encoding=encoding))
    assert listing.paths == ["a.png", "b.png"]
    assert listing.labels == ["Grün", "blue"]
    assert listing.metadata == {"remark": ['a, b; c\tand "d"', ""]}


def test_a_separator_within_a_quoted_name_does_not_count(folder):
    listing = read_manifest(csv(folder, 'path;label;"what, when, where"\na.png;cat;x\n'))
    assert listing.metadata == {"what, when, where": ["x"]}


@pytest.mark.parametrize("label", ["007", "1.0", "1e3", "true", "None", "nan", "NA", "null", "-", "O'Neil", "a|b"])
def test_a_label_is_text_as_written(folder, label):
    assert read_manifest(csv(folder, f"path,label\na.png,{label}\n")).labels == [label]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (pa.array([0, 1, 10], pa.int64()), ["0", "1", "10"]),
        (pa.array([0, 1, 10], pa.uint8()), ["0", "1", "10"]),
        (pa.array([0.0, 1.0, 10.0]), ["0", "1", "10"]),
        (pa.array([0.5, 1.0, 2.0]), ["0.5", "1", "2"]),
        (pa.array([True, False, True]), ["true", "false", "true"]),
        (pa.array(["007", " b", "1.0"]), ["007", "b", "1.0"]),
        (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
        (pa.array([7, 8, 7]).dictionary_encode(), ["7", "8", "7"]),
        (pa.array(["x", "y", "z"], pa.large_string()), ["x", "y", "z"]),
        (pa.array(["x", "y", "z"], pa.string_view()), ["x", "y", "z"]),
    ],
)
def test_labels_of_a_parquet_file(folder, values, labels):
    pq.write_table(pa.table({"path": ["a.png", "b.png", "c.png"], "label": values}), folder / "list.parquet")
    assert read_manifest(folder / "list.parquet").labels == labels


def test_numbers_with_gaps_stay_whole(folder):
    """Pandas turns a column of whole numbers into floats when one is missing."""
    frame = pd.DataFrame({"path": ["a.png", "b.png", "c.png"], "label": "x", "group": [3, None, 40]})
    frame.to_parquet(folder / "nulls.parquet")
    pq.write_table(pa.table({**frame, "group": pa.array([3.0, float("nan"), 40.0])}), folder / "nans.parquet")
    for name in ("nulls.parquet", "nans.parquet"):
        assert read_manifest(folder / name).groups == ["3", "", "40"]


def test_pandas_writes_the_same_manifest_in_both_formats(folder):
    rng = random.Random(0)
    frame = pd.DataFrame(
        {
            "path": ["a.png", "b.png", "c.png", "d.png", "e.png"],
            "label": [rng.choice(["x", "y, z", 'quoted "w"']) for _ in range(5)],
            "split": ["train", None, "Val", "TEST", "train"],
            "weight": [1.0, 0.1, 1 / 3, 2.5, 1e10],
            "group": [1, 2, 3, 4, 5],
            "note": ["", "line\nbreak", "ü", "x", "y"],
        }
    )
    frame.to_csv(folder / "list.csv", index=False)
    frame.to_csv(folder / "list.tsv", index=False, sep="\t")
    frame.to_parquet(folder / "list.pq")
    one, two, three = (read_manifest(folder / name) for name in ("list.csv", "list.tsv", "list.pq"))
    for other in (two, three):
        for name in ("paths", "labels", "given", "weights", "groups", "metadata"):
            assert getattr(one, name) == getattr(other, name), name
    assert one.weights == frame["weight"].tolist()
    assert one.labels == frame["label"].tolist()


def test_the_index_that_pandas_writes_is_no_metadata(folder):
    pd.DataFrame({"path": ["a.png"], "label": ["x"]}).to_csv(folder / "list.csv")
    assert read_manifest(folder / "list.csv").metadata is None


def test_empty_cells_around_a_table_are_nothing(folder):
    listing = read_manifest(csv(folder, "path;label;;\na.png;x;;\n;;;\nb.png;y;;\n;;;\n"))
    assert (listing.paths, listing.labels, listing.metadata) == (["a.png", "b.png"], ["x", "y"], None)


def test_other_column_names(folder):
    text = "Datei,Klasse,Menge,Patient,Gewicht,label\na.png,cat,train,p,2,ignored\n"
    listing = read_manifest(
        csv(folder, text),
        path_column="Datei",
        label_column="klasse",
        split_column="Menge",
        group_column="Patient",
        weight_column="Gewicht",
    )
    assert (listing.labels, listing.given, listing.groups, listing.weights) == (["cat"], ["train"], ["p"], [2.0])
    assert listing.metadata == {"label": ["ignored"]}


def test_column_names_count_in_any_case(folder):
    listing = read_manifest(csv(folder, "Path,LABEL,Split\na.png,cat,test\n"))
    assert (listing.labels, listing.given, listing.metadata) == (["cat"], ["test"], None)


def test_several_classes(folder):
    listing = read_manifest(csv(folder, "path,label\na.png,cat | dog\nb.png,\nc.png,dog\n"), separator="|")
    assert listing.separator == "|"
    assert [listing.classes_of(row) for row in range(3)] == [("cat", "dog"), (), ("dog",)]


# Where files may be


def test_paths_are_relative_to_the_manifest_or_the_root(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    manifest = csv(tmp_path / "elsewhere", "path,label\nsub dir/b.png,dog\n")
    listing = read_manifest(manifest, root=folder)
    assert listing.storage.location == str(folder)
    assert listing.storage.source(0) == folder / "sub dir" / "b.png"
    message = complaint(manifest)
    assert str(tmp_path / "elsewhere" / "sub dir" / "b.png") in message
    assert message.startswith("data.manifest: ")


def test_paths_in_other_forms(folder):
    text = f"path,label\n{folder}/a.png,x\nsub dir\\b.png,x\n./c.png,x\n.//d.png,x\nsub dir/./../e.png,x\n"
    listing = read_manifest(csv(folder, text))
    assert listing.paths == ["a.png", "sub dir/b.png", "c.png", "d.png", "sub dir/../e.png"]


@pytest.mark.parametrize("place", ["link", "images"])
def test_an_absolute_path_where_the_root_is_a_link(folder, tmp_path, place):
    (tmp_path / "link").symlink_to(folder)
    listing = read_manifest(csv(folder, f"path,label\n{tmp_path}/{place}/a.png,x\n"), root=tmp_path / "link")
    assert listing.paths == ["a.png"]
    assert listing.storage.source(0) == folder / "a.png"


@pytest.mark.parametrize("path", ["../outside.png", "{tmp}/outside.png", "link.png", "sub dir/../../outside.png"])
def test_files_outside_the_root_are_refused(folder, tmp_path, path):
    (tmp_path / "outside.png").write_bytes(b"")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    text = f"path,label\na.png,x\n{path.format(tmp=tmp_path)},x\n"
    message = complaint(csv(folder, text))
    assert "out of it" in message
    assert Path(path).name in message


def test_absent_files_are_counted(folder):
    message = complaint(csv(folder, "path,label\na.png,x\nz1.png,x\nz2.png,x\nz3.png,x\n"))
    assert "z1.png" in message
    assert "2 more" in message


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    assert "no regular file" in complaint(csv(folder, "path,label\npipe.png,x\n"))


# Mistakes


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ("a.png,,train,1\nb.png,x,train,1\nc.png,,train,1\n", ("row 2", "label", "wrong rows in all: 2")),
        ("a.png,x,train,1\nb.png,x,dev,1\n", ("row 3", "'dev'", "train, val or test")),
        ("a.png,x,train,1\n\nb.png,x,train,0\n", ("row 4", "'0'", "weight above 0")),
        ("a.png,x,train,-1\n", ("row 2", "'-1'")),
        ("a.png,x,train,nan\n", ("row 2", "'nan'")),
        ("a.png,x,train,inf\n", ("row 2", "'inf'")),
        ("a.png,x,train,\n", ("row 2", "found ''")),
        ("a.png,x,train,heavy\n", ("row 2", "'heavy'")),
        ("a.png,x,train,1\nb.png,x,train,1\na.png,y,test,1\n", ("row 4", "'a.png' of row 2", "every path once")),
        ("a.png,x,train,1\n./a.png,y,test,1\n", ("row 3", "'a.png' of row 2")),
        (",x,train,1\n", ("row 2", "a path, found none")),
        ("a.png,x,train\n", ("row 2", "expected 4 values", "found 3")),
        ('a.png,x,"2\nlines",1\nb.png,x,train,1,2\nc.png,1\n', ("row 3", "found 5", "wrong rows in all: 2")),
        ("a.png,,dev,0\nb.png,x,train,1\n", ("row 2", "label")),
    ],
)
def test_wrong_rows_are_told_by_number_and_counted(folder, rows, parts):
    message = complaint(csv(folder, "path,label,split,weight\n" + rows))
    for part in (str(folder / "list.csv"), *parts):
        assert part in message, message
    assert ("wrong rows in all" in message) == any("in all" in part for part in parts)


def test_a_row_with_two_mistakes_counts_once(folder):
    message = complaint(csv(folder, "path,label,split\na.png,x,train\nb.png,,dev\nc.png,x,dev\n"))
    assert "row 3" in message
    assert "wrong rows in all: 2" in message


def test_wrong_rows_of_a_parquet_file(folder):
    pd.DataFrame({"path": ["a.png", "b.png"], "label": ["x", None]}).to_parquet(folder / "list.parquet")
    assert "row 3: expected a label, found none" in complaint(folder / "list.parquet")


@pytest.mark.parametrize(
    ("header", "settings", "parts"),
    [
        ("paths,label", {}, ("data.path_column", "'path'", "'paths', 'label'", "did you mean 'paths'?")),
        ("path,lable", {}, ("data.label_column", "did you mean 'lable'?")),
        ("path,class", {}, ("data.label_column", "found 'path', 'class';")),
        ("path,label", {"group_column": "patient"}, ("data.group_column", "'patient'")),
        ("path,label", {"weight_column": "w"}, ("data.weight_column", "'w'")),
        ("path,label", {"split_column": "fold"}, ("data.split_column", "'fold'")),
        ("path,label,label", {}, ("once", "'label' again")),
    ],
)
def test_columns_that_are_not_there(folder, header, settings, parts):
    values = ",".join(["a.png"] + ["x"] * header.count(","))
    message = complaint(csv(folder, f"{header}\n{values}\n"), **settings)
    for part in (str(folder / "list.csv"), *parts):
        assert part in message, message


def test_a_column_that_is_no_text(folder):
    pq.write_table(pa.table({"path": ["a.png"], "label": [["x", "y"]], "more": [{"a": 1}]}), folder / "list.parquet")
    message = complaint(folder / "list.parquet")
    assert message.startswith("data.label_column: expected text")
    assert "list<" in message


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("list.csv", b"", ("expected a row",)),
        ("list.csv", b"path,label\n\n", ("expected a row",)),
        ("list.csv", "path,label\na.png,Gr\u00fcn\n".encode("latin-1"), ("UTF-8",)),
        ("list.csv", b'path,label\na.png,"x\n', ("quotation marks",)),
        ("list.parquet", b"PAR1 no", ("expected a Parquet file", "list.parquet")),
        ("list.xlsx", b"PK", (".csv", ".parquet", "list.xlsx")),
    ],
)
def test_files_that_are_no_manifest(folder, name, content, parts):
    (folder / name).write_bytes(content)
    message = complaint(folder / name)
    for part in ("data.manifest", *parts):
        assert part in message, message


def test_a_manifest_that_is_not_there(folder):
    assert "found none at" in complaint(folder / "list.csv")


def test_random_rows_against_pandas(folder):
    """The reader agrees with pandas on quoting."""
    rng = np.random.default_rng(0)
    letters = np.array(list("ab ,;\"'\t\n|é"))
    names = [f"{number:03d}.png" for number in range(200)]
    for name in names:
        (folder / name).write_bytes(b"")
    notes = ["".join(rng.choice(letters, 6)) for _ in names]
    frame = pd.DataFrame({"path": names, "label": "x", "note": notes})
    for separator in ",;\t":
        frame.to_csv(folder / "list.csv", index=False, sep=separator)
        assert read_manifest(folder / "list.csv").metadata == {"note": [note.strip() for note in notes]}
