"""What people are told of saved datasets that will not do."""

import sys
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from tests.saved_datasets import complaint, divided_dataset, encoded, features, saved


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    return divided_dataset(tmp_path)


def test_splits_of_other_names_are_refused(tmp_path):
    data = Dataset.from_dict({"image": encoded(range(2)), "label": [0, 1]}, features=features())
    message = complaint(saved(tmp_path, DatasetDict(train=data, unsupervised=data)))
    assert "'unsupervised'" in message
    assert "train, validation and test" in message


def test_unlabelled_rows_are_counted(tmp_path):
    """Test splits on the hub often have -1 for every label."""
    train = Dataset.from_dict({"image": encoded(range(2)), "label": [0, 1]}, features=features())
    test = Dataset.from_dict({"image": encoded(range(3)), "label": [0, -1, None]}, features=features())
    message = complaint(saved(tmp_path, DatasetDict(train=train, test=test)))
    assert message.startswith("data.label_column: expected a class in column 'label'")
    assert "test/000001 (and 1 more)" in message


def test_rows_without_an_image_are_counted(tmp_path):
    data = Dataset.from_dict({"image": [*encoded(range(2)), None, None, None], "label": [0] * 5}, features=features())
    assert "found none for 000002 (and 2 more)" in complaint(saved(tmp_path, data))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), None])
def test_wrong_weights(tmp_path, weight):
    kinds = features(weight=Value("float64"))
    data = Dataset.from_dict({"image": encoded(range(2)), "label": [0, 1], "weight": [1.0, weight]}, features=kinds)
    message = complaint(saved(tmp_path, data), weight_column="weight")
    assert message.startswith("data.weight_column: expected a weight above 0")
    assert "found none for 000001;" in message


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"image_column": "imag"}, ("data.image_column", "'imag'", "did you mean 'image'?", "image (Image)")),
        ({"image_column": "label"}, ("data.image_column", "label (ClassLabel)")),
        ({"label_column": "image"}, ("data.label_column", "'image'")),
        ({"label_column": "boxes"}, ("data.label_column", "boxes (List)")),
        ({"group_column": "patient"}, ("data.group_column", "'patient'")),
        ({"group_column": "boxes"}, ("data.group_column", "boxes (List)")),
        ({"weight_column": "wait"}, ("data.weight_column", "'wait'", "did you mean 'weight'?")),
    ],
)
def test_columns_that_will_not_do(tmp_path, settings, parts):
    kinds = features(boxes=List(List(Value("float32"))), weight=Value("float32"))
    values = {"image": encoded(range(1)), "label": [0], "boxes": [[[0.0]]], "weight": [1.0]}
    message = complaint(saved(tmp_path, Dataset.from_dict(values, features=kinds)), **settings)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("kinds", "setting"),
    [
        ({"a": Image(), "b": Image(), "label": ClassLabel(names=["x"])}, "data.image_column"),
        ({"text": Value("string"), "label": ClassLabel(names=["x"])}, "data.image_column"),
        ({"image": Image(), "a": ClassLabel(names=["x"]), "b": ClassLabel(names=["x"])}, "data.label_column"),
        ({"image": Image(), "score": Value("float32")}, "data.label_column"),
        ({"image": Image(), "label": Value("float32")}, "data.label_column"),
    ],
)
def test_no_choice_is_made_among_several_columns(tmp_path, kinds, setting):
    values = {
        name: encoded(range(1)) if isinstance(kind, Image) else ["x"] if kind == Value("string") else [0]
        for name, kind in kinds.items()
    }
    assert complaint(saved(tmp_path, Dataset.from_dict(values, features=Features(kinds)))).startswith(setting)


def test_splits_with_other_classes(tmp_path):
    train = Dataset.from_dict({"image": encoded(range(1)), "label": [0]}, features=features())
    other = Features({"image": Image(), "label": ClassLabel(names=["dog", "cat", "emu"])})
    test = Dataset.from_dict({"image": encoded(range(1)), "label": [0]}, features=other)
    assert "'test'" in complaint(saved(tmp_path, DatasetDict(train=train, test=test)))


@pytest.mark.parametrize("damage", ["empty", "no state", "no json", "cut", "no file", "a file", "absent"])
def test_folders_that_are_no_dataset(divided, tmp_path, damage):
    train = divided / "train"
    if damage == "empty":
        divided = tmp_path / "nothing"
        divided.mkdir()
    elif damage == "no state":
        (train / "state.json").unlink()
    elif damage == "no json":
        (train / "dataset_info.json").write_text("{")
    elif damage == "cut":
        (data,) = train.glob("*.arrow")
        data.write_bytes(data.read_bytes()[:200])
    elif damage == "no file":
        next(train.glob("*.arrow")).unlink()
    elif damage == "a file":
        divided = train / "state.json"
    else:
        divided = tmp_path / "absent"
    message = complaint(divided)
    assert message.startswith("data.root: expected")
    assert str(divided) in message


def test_a_dataset_without_rows(tmp_path):
    data = Dataset.from_dict({"image": [], "label": []}, features=features())
    assert "without empty splits" in complaint(saved(tmp_path, data))


def test_the_package_is_not_installed(divided, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "transfer-pipeline[huggingface]"' in complaint(divided)
