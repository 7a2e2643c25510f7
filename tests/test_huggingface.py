"""Images in a dataset that Hugging Face `datasets` has saved to disk."""

import json
import pickle
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, LargeList, List, Value

from datamodules.huggingface import ArrowStorage, read_dataset
from tests.saved_datasets import complaint, divided_dataset, encoded, features, picture, saved


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    return divided_dataset(tmp_path)


# What is read


def test_a_divided_dataset(divided):
    listing = read_dataset(divided)
    assert listing.paths == [
        *(f"train/{n:06d}" for n in range(10)),
        *(f"validation/{n:06d}" for n in range(3)),
        "test/000000",
        "test/000001",
    ]
    assert listing.given == ["train"] * 10 + ["val"] * 3 + ["test"] * 2
    assert listing.labels == [["cat", "dog", "emu"][n % 3] for n in range(15)]
    assert (listing.groups, listing.weights, listing.separator) == (None, None, None)
    assert listing.storage.location == str(divided)
    for row in range(15):
        assert listing.storage.source(row) == picture(row)
        assert listing.storage.size(row) == len(picture(row))
        assert listing.paths[row] in listing.storage.describe(row)
        assert str(divided) in listing.storage.describe(row)


def test_a_lone_dataset_is_not_divided(tmp_path):
    data = Dataset.from_dict({"image": encoded(range(4)), "label": [0, 1, 2, 0]}, features=features())
    listing = read_dataset(saved(tmp_path, data))
    assert listing.paths == ["000000", "000001", "000002", "000003"]
    assert listing.given == [None] * 4


def test_images_keep_their_file_names_where_these_differ(tmp_path):
    data = Dataset.from_dict({"image": encoded(range(3), "x/cat {}.png"), "label": [0] * 3}, features=features())
    both = DatasetDict(train=data, test=data)
    listing = read_dataset(saved(tmp_path, both))
    assert listing.paths == [f"{split}/cat {n}.png" for split in ("train", "test") for n in range(3)]
    same = Dataset.from_dict({"image": encoded(range(3), "image.png"), "label": [0] * 3}, features=features())
    assert read_dataset(saved(tmp_path / "2", same)).paths == ["000000", "000001", "000002"]


@pytest.mark.parametrize("kind", [Value("string"), Value("large_string")])
def test_images_that_are_files(tmp_path, kind):
    (tmp_path / "files").mkdir()
    files = [tmp_path / "files" / f"{n}.png" for n in range(3)]
    for n, file in enumerate(files):
        file.write_bytes(picture(n))
    paths = [*map(str, files[:2]), "../files/2.png"]
    kinds = Features({"image": kind, "label": ClassLabel(names=["a"])})
    folder = saved(tmp_path, Dataset.from_dict({"image": paths, "label": [0, 0, 0]}, features=kinds))
    listing = read_dataset(folder)
    assert listing.paths == ["0.png", "1.png", "2.png"]
    assert [Path(listing.storage.source(row)).resolve() for row in range(3)] == files
    assert listing.storage.size(2) == len(picture(2))
    files[1].unlink()
    message = complaint(folder)
    assert "expected an image in column 'image'" in message
    assert "found none for 1.png;" in message


def test_images_are_numbered_where_one_has_no_file_name(tmp_path):
    pictures = [*encoded(range(1), "a.png"), *encoded(range(1, 2))]
    data = Dataset.from_dict({"image": pictures, "label": [0, 0]}, features=features())
    assert read_dataset(saved(tmp_path, data)).paths == ["000000", "000001"]


def test_rows_were_selected_and_shuffled_before(tmp_path):
    data = Dataset.from_dict({"image": encoded(range(30)), "label": [n % 3 for n in range(30)]}, features=features())
    data = data.shuffle(seed=0).select(range(5, 25))
    listing = read_dataset(saved(tmp_path, data, num_shards=3))
    for row, item in enumerate(data.cast_column("image", Image(decode=False))):
        assert listing.storage.source(row) == item["image"]["bytes"]
        assert listing.labels[row] == ["cat", "dog", "emu"][item["label"]]


@pytest.mark.parametrize(
    ("kind", "values", "labels"),
    [
        (Value("string"), ["b", " a ", "007"], ["b", "a", "007"]),
        (Value("large_string"), ["b", "a", "c"], ["b", "a", "c"]),
        (Value("int64"), [3, 12, 3], ["3", "12", "3"]),
        (Value("uint8"), [3, 12, 3], ["3", "12", "3"]),
        (Value("bool"), [True, False, True], ["true", "false", "true"]),
        (ClassLabel(names=["x y", "z"]), [1, 0, 1], ["z", "x y", "z"]),
    ],
)
def test_kinds_of_labels(tmp_path, kind, values, labels):
    data = Dataset.from_dict(
        {"image": encoded(range(3)), "label": values}, features=Features({"image": Image(), "label": kind})
    )
    assert read_dataset(saved(tmp_path, data)).labels == labels


@pytest.mark.parametrize("container", [List, LargeList])
@pytest.mark.parametrize(
    ("kind", "values", "classes"),
    [
        (ClassLabel(names=["a|b", "c", "d;"]), [[0, 1], [], [2]], [("a|b", "c"), (), ("d;",)]),
        (Value("string"), [["x", "y"], None, ["z"]], [("x", "y"), (), ("z",)]),
        (Value("int64"), [[1, 2], [3], []], [("1", "2"), ("3",), ()]),
    ],
)
def test_several_classes(tmp_path, container, kind, values, classes):
    data = Dataset.from_dict(
        {"image": encoded(range(3)), "labels": values},
        features=Features({"image": Image(), "labels": container(kind)}),
    )
    listing = read_dataset(saved(tmp_path, data))
    assert listing.separator is not None
    assert [listing.classes_of(row) for row in range(3)] == classes


def test_gaps_among_several_classes_are_no_classes(tmp_path):
    kinds = Features({"image": Image(), "labels": List(ClassLabel(names=["a", "b"]))})
    data = Dataset.from_dict({"image": encoded(range(2)), "labels": [[1, -1, 0], [None]]}, features=kinds)
    assert read_dataset(saved(tmp_path, data)).labels == ["b|a", ""]


def test_groups_and_weights(tmp_path):
    data = Dataset.from_dict(
        {
            "image": encoded(range(3)),
            "label": [0, 1, 2],
            "patient": [4, None, 5],
            "site": ["A", "", "B"],
            "weight": [0.5, 1.0, 3.0],
        },
        features=features(patient=Value("int64"), site=Value("string"), weight=Value("float32")),
    )
    folder = saved(tmp_path, data)
    listing = read_dataset(folder, group_column="patient", weight_column="weight")
    assert (listing.groups, listing.weights) == (["4", "", "5"], [0.5, 1.0, 3.0])
    assert read_dataset(folder, group_column="site").groups == ["A", "", "B"]


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"image": Image(), "mask": Image(), "label": ClassLabel(names=["a"])}, ("image", "label")),
        ({"img": Image(), "label": Value("int64"), "fine": Value("int64")}, ("img", "label")),
        ({"photo": Image(decode=False), "kind": ClassLabel(names=["a"]), "id": Value("int64")}, ("photo", "kind")),
        ({"image": Value("binary"), "label": ClassLabel(names=["a"])}, ("image", "label")),
        (
            {"image": Image(), "labels": ClassLabel(names=["a"]), "coarse": ClassLabel(names=["a"])},
            ("image", "labels"),
        ),
    ],
)
def test_columns_are_found_by_type_and_name(tmp_path, columns, chosen):
    image, label = chosen
    values: dict[str, Any] = {}
    for number, (name, kind) in enumerate(columns.items()):
        raw = [picture(number)] if kind == Value("binary") else encoded(range(number, number + 1))
        values[name] = [number] if "int" in str(getattr(kind, "dtype", "")) else raw
        if isinstance(kind, ClassLabel):
            values[name] = [0]
    folder = saved(tmp_path, Dataset.from_dict(values, features=Features(columns)))
    for settings in ({}, {"image_column": image, "label_column": label}):
        listing = read_dataset(folder, **settings)
        assert listing.storage.source(0) == picture(list(columns).index(image))
        assert listing.labels == ["a" if isinstance(columns[label], ClassLabel) else str(list(columns).index(label))]


def test_a_column_of_the_persons_choice(tmp_path):
    kinds = {"image": Image(), "mask": Image(), "label": ClassLabel(names=["a"]), "coarse": Value("string")}
    values = {"image": encoded(range(1)), "mask": encoded(range(1, 2)), "label": [0], "coarse": ["b"]}
    folder = saved(tmp_path, Dataset.from_dict(values, features=Features(kinds)))
    listing = read_dataset(folder, image_column="mask", label_column="coarse")
    assert (listing.storage.source(0), listing.labels) == (picture(1), ["b"])


# How it is read


def test_a_storage_is_small_and_opens_in_other_processes(tmp_path):
    pictures = [{"bytes": np.random.default_rng(n).bytes(5_000), "path": None} for n in range(200)]
    data = Dataset.from_dict({"image": pictures, "label": [0] * 200}, features=features())
    storage = read_dataset(saved(tmp_path, data)).storage
    assert storage.source(7) == pictures[7]["bytes"]
    sent = pickle.dumps(storage)
    assert len(sent) < 10_000
    assert pickle.loads(sent).source(7) == pictures[7]["bytes"]

    class Lengths(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 200

        def __getitem__(self, row: int) -> int:
            return sum(storage.source(row))

    for workers in (0, 2):
        sums = torch.cat(list(torch.utils.data.DataLoader(Lengths(), batch_size=32, num_workers=workers)))
        assert sums.tolist() == [sum(item["bytes"]) for item in pictures]


def test_threads_may_open_and_read_at_the_same_time(divided):
    storage = pickle.loads(pickle.dumps(read_dataset(divided).storage))
    together = threading.Barrier(8)

    def read(start: int) -> bool:
        together.wait()
        return all(storage.source(row) == picture(row) for row in [*range(start, 15), *range(start)])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_images_are_not_held_in_memory(tmp_path):
    """A process that has read one image of a large dataset has not read the others."""
    pictures = [{"bytes": np.random.default_rng(n).bytes(1_000_000), "path": None} for n in range(60)]
    data = Dataset.from_dict({"image": pictures, "label": [0] * 60}, features=features())
    folder = saved(tmp_path, data)
    code = (
        "import pickle, sys, datasets, pyarrow.compute\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "storage = pickle.loads(bytes.fromhex(sys.stdin.read()))\n"
        "before = resident()\n"
        "assert len(storage.source(3)) == 1_000_000\n"
        "print(resident() - before)\n"
    )
    sent = pickle.dumps(ArrowStorage(folder, "image", [])).hex()
    grown = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 30_000_000


def test_nothing_is_run_and_nothing_is_fetched(divided, monkeypatch):
    attempts: list[object] = []

    def refuse(*args: object) -> None:
        attempts.append(args)
        raise OSError("this test must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    trap = f"open({str(divided / 'run')!r}, 'w')\n"
    for folder in (divided, divided / "train"):
        for name in ("saved.py", "train.py", "dataset.py", "__init__.py", "sitecustomize.py"):
            (folder / name).write_text(trap)
    listing = read_dataset(divided)
    assert listing.storage.source(0) == picture(0)
    assert not (divided / "run").exists()
    assert not attempts


def test_an_unknown_type_is_no_way_in(divided):
    """Types of columns are looked up by name in a file that comes with the data."""
    file = divided / "train" / "dataset_info.json"
    info = json.loads(file.read_text())
    for name in ("os", "np", "Path", "Pickler", "_ArrayXD"):
        info["features"]["label"] = {"_type": name, "feature": {"_type": "Value", "dtype": "int64"}}
        file.write_text(json.dumps(info))
        assert "found none that can be read" in complaint(divided)
