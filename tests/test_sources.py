"""Where images come from, and how they are divided."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from datamodules import DataError, ElpvDataModule
from datamodules.splits import stratified_split
from datamodules.table import list_images
from tests.images import RECORD, attach, folder_module, save, split_of

# Splits


@pytest.mark.parametrize(
    "fractions",
    [{"train": 0.65, "val": 0.15, "test": 0.2}, {"train": 0.8, "val": 0.2}, {"train": 0.1, "val": 0.3, "test": 0.6}],
)
def test_every_stratum_is_divided_by_the_shares_to_within_one_image(fractions):
    sizes = {"a": 101, "b": 40, "c": 17, "d": 10}
    strata = [name for name, size in sizes.items() for _ in range(size)]
    names = stratified_split(strata, fractions, seed=3)
    assert len(names) == len(strata)
    for stratum, size in sizes.items():
        found = Counter(name for name, s in zip(names, strata, strict=True) if s == stratum)
        assert sum(found.values()) == size
        for split, fraction in fractions.items():
            assert abs(found[split] - fraction * size) <= 1


def test_strata_of_three_images_and_more_reach_every_split():
    for size in range(3, 25):
        names = stratified_split(["a"] * size + ["b"] * 40, {"train": 0.9, "val": 0.05, "test": 0.05}, seed=size)
        assert set(names[:size]) == {"train", "val", "test"}
        assert Counter(names[:size]).most_common(1)[0][0] == "train" or size == 3


def test_a_split_depends_on_its_seed_alone():
    strata = ["a", "b"] * 30
    fractions = {"train": 0.5, "val": 0.25, "test": 0.25}
    first = stratified_split(strata, fractions, seed=0)
    np.random.seed(5)
    assert (stratified_split(strata, fractions, seed=0) == first).all()
    assert (stratified_split(strata, fractions, seed=1) != first).any()
    # Files in order of capture must not end up in one split.
    assert len(set(first[:12:2])) > 1


# Class folders


def test_undivided_folders_are_divided_alike_for_every_class(image_folder):
    root = image_folder({"cat": 40, "dog/young": 10, "dog/old": 10})
    module = folder_module(root, val_fraction=0.15, test_fraction=0.2)
    assert module.classes == ["cat", "dog"]
    assert module.table.split_is_ours
    counts = {split: dict(module.table.counts(split)) for split in ("train", "val", "test")}
    assert counts == {
        "train": {"cat": 26, "dog": 13},
        "val": {"cat": 6, "dog": 3},
        "test": {"cat": 8, "dog": 4},
    }
    assert sorted(module.table.paths) == list_images(root, root)
    assert {path.split("/")[1] for path in module.table.paths if path.startswith("dog")} == {"young", "old"}
    parts = [set(module.images(split).paths) for split in ("train", "val", "test")]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_the_split_follows_split_seed_and_not_seed(image_folder):
    root = image_folder({"cat": 12, "dog": 12})
    first = split_of(folder_module(root).table)
    assert split_of(folder_module(root, seed=1).table) == first
    assert split_of(folder_module(root, split_seed=1).table) != first


def test_given_folders_are_kept(image_folder):
    root = image_folder(
        {f"{split}/{label}": n for split, n in (("train", 3), ("val", 2), ("test", 1)) for label in ("cat", "dog")}
    )
    table = folder_module(root).table
    assert not table.split_is_ours
    assert len(table.paths) == 12
    assert all(path.startswith(f"{split}/") for path, split in split_of(table).items())
    assert split_of(folder_module(root, split_seed=9).table) == split_of(table)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_may_have_any_of_its_usual_names(image_folder, name):
    root = image_folder({"train/cat": 9, "train/dog": 9, f"{name}/cat": 2, f"{name}/dog": 2})
    table = folder_module(root, test_fraction=0.2).table
    by_folder = Counter((path.split("/")[0], split) for path, split in split_of(table).items())
    assert by_folder == {("train", "train"): 14, ("train", "test"): 4, (name, "val"): 4}
    assert table.split_is_ours


def test_folders_of_splits_may_be_named_in_any_case(image_folder):
    root = image_folder({"Train/cat": 4, "Train/dog": 4, "VAL/cat": 1, "VAL/dog": 1, "Test/cat": 2, "Test/dog": 2})
    module = folder_module(root)
    assert module.classes == ["cat", "dog"]
    assert [sum(module.table.counts(split).values()) for split in ("train", "val", "test")] == [8, 2, 4]
    assert not module.table.split_is_ours


def test_evaluation_folders_without_a_training_folder_are_refused(image_folder):
    with pytest.raises(DataError, match=r"data\.root: expected a folder 'train' beside 'val and test'"):
        folder_module(image_folder({"val/cat": 4, "val/dog": 4, "test/cat": 4, "test/dog": 4}))


def test_missing_splits_are_taken_out_of_train(image_folder):
    root = image_folder({"train/cat": 20, "train/dog": 20})
    table = folder_module(root, val_fraction=0.15, test_fraction=0.2).table
    assert table.split_is_ours
    assert {split: dict(table.counts(split)) for split in ("train", "val", "test")} == {
        "train": {"cat": 13, "dog": 13},
        "val": {"cat": 3, "dog": 3},
        "test": {"cat": 4, "dog": 4},
    }


def test_a_split_that_lacks_a_class_keeps_the_indices(image_folder):
    root = image_folder({"train/ant": 2, "train/bee": 2, "train/cow": 2, "val/cow": 3, "test/ant": 1, "test/cow": 2})
    module = folder_module(root)
    assert module.classes == ["ant", "bee", "cow"]
    assert module.dataset("val").targets.tolist() == [2, 2, 2]
    assert module.dataset("test").targets.tolist() == [0, 2, 2]
    (batch,) = module.val_dataloader()
    assert batch["target"].tolist() == [2, 2, 2]


def test_classes_of_a_checkpoint_keep_their_order_and_indices(image_folder):
    root = image_folder({"train/ant": 2, "train/bee": 2, "val/ant": 1, "val/bee": 1, "test/bee": 2})
    module = folder_module(root, classes=["cow", "bee", "ant"])
    assert module.classes == ["cow", "bee", "ant"]
    assert module.dataset("train").targets.tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_unknown_class_in_an_evaluation_split_is_named_with_its_file(image_folder, split):
    root = image_folder({"train/ant": 4, "train/bee": 4, f"{split}/ant": 1, f"{split}/wasp": 1})
    with pytest.raises(DataError) as caught:
        folder_module(root)
    assert f"{split}/wasp/000.png" in str(caught.value)
    assert "'wasp'" in str(caught.value)
    assert "ant, bee" in str(caught.value)


def test_a_class_that_the_checkpoint_does_not_know_is_named_with_its_file(image_folder):
    module = folder_module(image_folder({"ant": 4, "wasp": 4}), classes=["ant", "bee"])
    with pytest.raises(DataError, match=r"wasp/000\.png: expected a class .*ant, bee.* found 'wasp'"):
        module.test_dataloader()


@pytest.mark.parametrize(
    ("counts", "texts"),
    [
        ({"cat": 5, "dog": 0}, ["'dog'", "found none", "remove the folder"]),
        ({"cat": 5, "dog": 2}, ["at least 3 images of class 'dog'", "found 2"]),
        ({"cat": 5}, ["at least 2 classes", "found 1 (cat)"]),
        ({"train/cat": 3, "train/dog": 1, "val/cat": 1, "val/dog": 1}, ["at least 2 images of class 'dog'", "test"]),
        ({"train": 0}, ["a folder for each class"]),
    ],
    ids=["empty class", "too few images", "one class", "too few for the missing split", "no classes"],
)
def test_folders_that_cannot_be_trained_on_are_refused(image_folder, counts, texts):
    root = image_folder(counts)
    with pytest.raises(DataError) as caught:
        folder_module(root)
    for text in [*texts, "data.root"]:
        assert text in str(caught.value)


def test_an_absent_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.root: .*nothing at '.*absent'"):
        folder_module(tmp_path / "absent")
    with pytest.raises(DataError, match=r"give --data\.root"):
        folder_module(None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"val_fraction": -0.1}, r"data\.val_fraction.*found -0\.1"),
        ({"test_fraction": 1.0}, r"data\.test_fraction.*found 1\.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"sum below 1"),
        ({"batch_size": 1}, r"data\.batch_size.*at least 2.*found 1"),
        ({"num_workers": -1}, r"data\.num_workers.*found -1"),
        ({"split_seed": -1}, r"data\.split_seed.*found -1"),
        ({"seed": -1}, r"data\.seed.*found -1"),
        ({"image_size": 16}, r"data\.image_size.*found 16"),
        ({"crop_fraction": 1.5}, r"data\.crop_fraction.*found 1\.5"),
        ({"crop_fraction": 0.0}, r"data\.crop_fraction.*found 0\.0"),
        ({"preprocessing": None}, r"data\.preprocessing.*preprocessing_record"),
        ({"train_transforms": "medium"}, r"data\.train_transforms.*'medium'"),
    ],
)
def test_settings_out_of_range_are_named(image_folder, settings, named):
    with pytest.raises(DataError, match=named):
        folder_module(image_folder({"cat": 6, "dog": 6}), **settings)


def test_image_size_and_crop_fraction_override_the_record(image_folder):
    root = image_folder({"cat": 6, "dog": 6})
    module = folder_module(root, image_size=48, crop_fraction=1.0)
    assert (module.preprocessing.size, module.preprocessing.crop) == (48, 1.0)
    assert next(iter(module.train_dataloader()))["image"].shape[-2:] == (48, 48)
    assert next(iter(module.val_dataloader()))["image"].shape[-2:] == (48, 48)
    assert folder_module(root).preprocessing.to_dict() == RECORD
    assert RECORD["size"] == 32


def test_hidden_files_and_other_files_are_passed_over(image_folder):
    root = image_folder({"cat": 4, "dog": 4})
    (root / "cat" / "notes.txt").write_text("no image")
    shutil.copy(root / "cat" / "000.png", root / "cat" / "._000.png")
    save(root / "cat" / ".thumbnails" / "000.png")
    save(root / ".cache" / "000.png")
    shutil.copy(root / "cat" / "000.png", root / "cat" / "UPPER.PNG")
    module = folder_module(root)
    assert module.classes == ["cat", "dog"]
    assert len(module.table.paths) == 9
    assert "cat/UPPER.PNG" in module.table.paths


def test_a_folder_that_is_named_like_an_image_is_not_one(image_folder):
    root = image_folder({"cat": 4, "dog/cell.png": 4})
    assert len(folder_module(root).table.paths) == 8


# The data a checkpoint was trained with


def test_the_digest_stands_for_paths_labels_splits_and_sizes(image_folder):
    root = image_folder({"cat": 6, "dog": 6})
    digest = folder_module(root).table.digest
    assert folder_module(root, seed=3).table.digest == digest
    assert folder_module(root, split_seed=3).table.digest != digest
    table = folder_module(root).table
    relabelled = replace(table, listing=replace(table.listing, labels=["dog", *table.labels[1:]]))
    assert relabelled.digest != digest
    moved = shutil.copytree(root, root.parent / "moved")
    assert folder_module(moved).table.digest == digest, "the same data at another place is the same data"
    path = root / "cat" / "000.png"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    assert folder_module(root).table.digest != digest
    path.write_bytes(content)
    assert folder_module(root).table.digest == digest
    path.rename(path.with_name("renamed.png"))
    assert folder_module(root).table.digest != digest


@pytest.mark.parametrize("stage", [TrainerFn.FITTING, TrainerFn.TESTING, TrainerFn.VALIDATING])
def test_a_checkpoint_of_another_split_is_refused(image_folder, stage):
    root = image_folder({"cat": 8, "dog": 8})
    state = folder_module(root).state_dict()
    attach(folder_module(root, seed=5), stage).load_state_dict(state)
    other = attach(folder_module(root, split_seed=1), stage)
    with pytest.raises(DataError) as caught:
        other.load_state_dict(state)
    assert state["digest"][:12] in str(caught.value)
    assert other.table.digest[:12] in str(caught.value)
    assert "data.split_seed" in str(caught.value)


def test_a_checkpoint_may_be_tested_on_another_test_set_but_not_trained_on_other_data(image_folder):
    counts = {f"{split}/{label}": 2 for split in ("train", "val", "test") for label in ("cat", "dog")}
    state = folder_module(image_folder(counts)).state_dict()
    other = image_folder({**counts, "test/cat": 4}, name="other")
    attach(folder_module(other), TrainerFn.TESTING).load_state_dict(state)
    attach(folder_module(other), TrainerFn.VALIDATING).load_state_dict(state)
    with pytest.raises(DataError, match="digest"):
        attach(folder_module(other), TrainerFn.FITTING).load_state_dict(state)


def test_predicting_a_folder_asks_for_no_training_data(image_folder):
    folder = image_folder({"": 2}, name="unlabelled")
    module = folder_module(None, classes=["cat", "dog"], predict_path=str(folder))
    attach(module, TrainerFn.PREDICTING)
    module.load_state_dict({"digest": "of the training data", "position": None})
    module.prepare_data()


# ELPV


@pytest.fixture
def elpv_root(tmp_path: Path) -> Path:
    """Twenty images of each probability and cell type that the real data set has, without ten thousand pixels."""
    root = tmp_path / "elpv"
    lines = []
    for probability in ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0"):
        for cell_type in ("mono", "poly"):
            for _ in range(20):
                path = f"images/cell{len(lines):04d}.png"
                lines.append(f"{path}  {probability:20s}{cell_type}")
    (root / "images").mkdir(parents=True)
    Image.new("L", (30, 30), 100).save(root / "images" / "cell0000.png")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    for line in lines[1:]:
        shutil.copy(root / "images" / "cell0000.png", root / line.split()[0])
    return root


def elpv_module(root: Path | None, **settings: Any) -> ElpvDataModule:
    where = None if root is None else str(root)
    return ElpvDataModule(root=where, preprocessing=RECORD, num_workers=0, batch_size=4, **settings)


def test_elpv_cells_are_defective_above_one_half(elpv_root):
    module = elpv_module(elpv_root)
    assert module.classes == ["defective", "functional"]
    labels = dict(zip(module.table.paths, module.table.labels, strict=True))
    for line in (elpv_root / "labels.csv").read_text().splitlines():
        path, probability, _ = line.split()
        assert labels[path] == ("defective" if probability in ("0.6666666666666666", "1.0") else "functional")
    listing = elpv_root / "labels.csv"
    listing.write_text(listing.read_text().replace("0.6666666666666666", "0.5               "))
    assert elpv_module(elpv_root).table.labels.count("defective") == 40


def test_elpv_splits_are_balanced_by_label_and_cell_type(elpv_root):
    module = elpv_module(elpv_root, val_fraction=0.15, test_fraction=0.2)
    types = {line.split()[0]: line.split()[2] for line in (elpv_root / "labels.csv").read_text().splitlines()}
    found = Counter(
        (split, label, types[path])
        for path, label, split in zip(module.table.paths, module.table.labels, module.table.splits, strict=True)
    )
    assert found == {
        (split, label, cell_type): count
        for split, count in (("train", 26), ("val", 6), ("test", 8))
        for label in ("defective", "functional")
        for cell_type in ("mono", "poly")
    }
    assert module.table.split_is_ours
    assert split_of(elpv_module(elpv_root, split_seed=1).table) != split_of(module.table)


def test_elpv_images_are_read_as_colour(elpv_root):
    batch = next(iter(elpv_module(elpv_root).val_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert (batch["image"] == 100).all()


def test_elpv_without_its_listing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.root: expected the ELPV file labels\.csv"):
        elpv_module(tmp_path)


def test_elpv_as_installed_has_the_published_counts():
    pytest.importorskip("elpv_dataset")
    module = elpv_module(None)
    assert len(module.table.paths) == 2624
    assert Counter(module.table.labels) == {"functional": 1803, "defective": 821}
    for split, fraction in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert sum(module.table.counts(split).values()) == pytest.approx(2624 * fraction, abs=4)
        assert module.table.counts(split)["defective"] == pytest.approx(821 * fraction, abs=2)
    assert next(iter(module.test_dataloader()))["image"].shape == (4, 3, 32, 32)
