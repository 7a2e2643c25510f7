"""Files of weights: every kind that is read, what is refused and how, and what our own files hand on."""

import json
import os
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.backbones import IMAGENET_PREPROCESSING, create_backbone, default_preprocessing
from pipeline.models.files import SUFFIXES, Facts, read_facts, save_weights
from pipeline.models.weights import Lineage, load_pretrained, preprocessing_record
from pipeline.registry.weights import registered_weights
from pipeline.task import ClassificationTask
from tests.states import SMALL, assert_loaded, assert_refused, assert_same, randomised, save

pytestmark = pytest.mark.usefixtures("no_network")

TORCH_SUFFIXES = (".pth", ".pt", ".th", ".bin", ".tar", ".pth.tar", ".ckpt")
LICENCE = "cc-by-nc-4.0"
RECORD = {**IMAGENET_PREPROCESSING, "size": 96, "crop": 0.9, "mean": [0.4, 0.5, 0.6]}


def small_state(seed: int = 0) -> dict[str, Tensor]:
    return randomised(create_backbone(SMALL, 7), seed)


# Kinds of file


def test_these_kinds_of_file_are_all():
    assert set(SUFFIXES) == {Path(f"weights{suffix}").suffix for suffix in (".safetensors", *TORCH_SUFFIXES)}


def test_a_safetensors_file_loads(tmp_path):
    network, state = create_backbone(SMALL, 3), small_state()
    load_pretrained(network, save(state, tmp_path / "weights.safetensors"))
    assert_loaded(network, state)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", TORCH_SUFFIXES)
def test_a_torch_file_of_any_age_loads(tmp_path, suffix, zipped):
    network, state = create_backbone(SMALL, 3), small_state()
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    report = load_pretrained(network, str(path))
    assert_loaded(network, state)
    assert report.unwrapped == ()


# Checkpoints of training programs


@pytest.mark.parametrize(
    ("entries", "taken"),
    [
        ("state_dict_ema state_dict", "state_dict_ema"),
        ("model model_ema", "model_ema"),
        ("model model_ema state_dict", "model_ema"),
        ("state_dict model_ema state_dict_ema", "state_dict_ema"),
        ("model state_dict", "state_dict"),
        ("state_dict", "state_dict"),
        ("model", "model"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_averaged_tensors_are_preferred_and_what_else_there_is_is_ignored(tmp_path, entries, taken, zipped):
    states = {name: small_state(seed) for seed, name in enumerate(entries.split())}
    others = {"optimizer": {"state": {0: {"step": torch.ones(1)}}}, "epoch": 90, "args": {"lr": 0.1, "name": "x"}}
    path = tmp_path / "checkpoint.pth"
    torch.save({**others, **states, "best": None}, path, _use_new_zipfile_serialization=zipped)
    network = create_backbone(SMALL, 3)
    report = load_pretrained(network, str(path))
    assert_loaded(network, states[taken])
    assert report.unwrapped == (f"found in '{taken}'",)
    assert f"found in '{taken}'" in str(report)


@pytest.mark.parametrize("empty", [None, {}, {"decay": 0.99}])
def test_an_entry_without_tensors_is_passed_over(tmp_path, empty):
    state = small_state()
    torch.save({"state_dict_ema": empty, "state_dict": state}, tmp_path / "checkpoint.pth")
    network = create_backbone(SMALL, 3)
    assert load_pretrained(network, str(tmp_path / "checkpoint.pth")).unwrapped == ("found in 'state_dict'",)
    assert_loaded(network, state)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({}, "an empty dict"),
        ([torch.zeros(1)], "list"),
        (torch.zeros(1), "Tensor"),
        ({0: torch.zeros(1)}, "a dict with 0"),
        ({"weights": {"fc.weight": torch.zeros(1)}, "epoch": 1}, "a dict with 'weights', 'epoch'"),
        ({"model": {"blocks": {"fc.weight": torch.zeros(1)}}}, "a dict with 'model'"),
    ],
    ids=["empty", "list", "tensor", "numbered", "unknown entry", "deeper"],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "weights.pth")
    address = str(tmp_path / "weights.pth")
    assert_refused(create_backbone(SMALL, 3), address, f"'{address}'", f"found {found};", "state_dict_ema, model_ema")


# Unsafe, damaged and absent files


class Malicious:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", TORCH_SUFFIXES)
def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path, suffix, zipped):
    mark, path = tmp_path / "mark", tmp_path / f"weights{suffix}"
    torch.save({**small_state(), "extra": Malicious(mark)}, path, _use_new_zipfile_serialization=zipped)
    convert = ("other objects than tensors", "weights_only=False", "safetensors.torch.save_file(state['state_dict']")
    assert_refused(create_backbone(SMALL, 3), str(path), f"'{path}'", *convert)
    assert not mark.exists()
    if zipped:  # might be a checkpoint of ours, and is looked into for its record
        with pytest.raises(UserError, match="other objects than tensors"):
            preprocessing_record(SMALL, str(path))
        assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file was harmless, and this test showed nothing"


@pytest.mark.parametrize("suffix", TORCH_SUFFIXES)
def test_a_plain_pickle_is_refused_and_does_not_run(tmp_path, suffix):
    mark, path = tmp_path / "mark", tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(Malicious(mark), protocol=2))
    assert_refused(create_backbone(SMALL, 3), str(path), f"'{path}'", "cannot be read", "safetensors")
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


class Settings:
    """What training programs put beside the tensors: an object of a class."""


def test_the_way_to_convert_an_unsafe_file_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = small_state()
    torch.save({"state_dict": state, "args": Settings()}, "published.pth")
    network = create_backbone(SMALL, 3)
    message = assert_refused(network, "published.pth")
    recipe = message.partition("convert it once: ")[2].removesuffix(".")
    assert recipe.count(";") == 1
    exec(f"import safetensors.torch\n{recipe}".replace("; ", "\n"), {"torch": torch, "file": "published.pth"})
    load_pretrained(network, "weights.safetensors")
    assert_loaded(network, state)


def test_a_pickled_network_is_refused_with_the_way_on(tmp_path):
    torch.save(create_backbone(SMALL, 3), tmp_path / "whole.pth")
    assert_refused(
        create_backbone(SMALL, 3), str(tmp_path / "whole.pth"), "other objects than tensors", "weights_only=False"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_damaged_file_is_named(tmp_path, suffix, keep):
    path = tmp_path / f"weights{suffix}"
    save(small_state(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert_refused(create_backbone(SMALL, 3), str(path), f"at '{path}'", "cannot be read")


def test_an_unknown_kind_of_file_is_refused_with_all_that_is_known(tmp_path):
    network = create_backbone(SMALL, 3)
    (tmp_path / "weights.onnx").write_bytes(b"onnx")
    addresses = ("timm/<tag>", "hf-hub:<owner>/", "torchvision/<name>", "package:<module>/", "models:/<name>@<alias>")
    for address in (str(tmp_path / "weights.onnx"), "resnet18", "resnet18.a1_in1k"):
        assert_refused(network, address, f"'{address}'", *addresses, ".safetensors", ".pth", ".ckpt")


def test_a_missing_file_is_named_with_its_near_match(tmp_path):
    (tmp_path / "cells_resnet18.pth").write_bytes(b"")
    address = str(tmp_path / "cell_resnet18.pth")
    network = create_backbone(SMALL, 3)
    assert_refused(network, address, f"'{address}'", "did you mean cells_resnet18.pth?")
    assert_refused(network, str(tmp_path / "nowhere" / "weights.pth"), "found nothing")
    with pytest.raises(UserError, match="found nothing"):
        preprocessing_record(SMALL, address)


def test_a_folder_is_refused_with_the_file_that_may_be_meant(tmp_path):
    (tmp_path / "run.pth").mkdir()
    network = create_backbone(SMALL, 3)
    for folder in (tmp_path, tmp_path / "run.pth"):
        assert_refused(network, str(folder), f"found the folder '{folder}'", "best.ckpt")


def test_a_registered_model_is_refused_with_the_function_that_fetches_it():
    name = f"{registered_weights.__module__}.{registered_weights.__name__}"
    assert_refused(create_backbone(SMALL, 3), "models:/cells@champion", "'models:/cells@champion'", f"use {name}.")


# Our own files


def checkpoint(path: Path, weights: str | None) -> ClassificationTask:
    """What ``fit`` would write, without training; every tensor of the network has values of its own."""
    task = ClassificationTask(classes=["a", "b", "c"], preprocessing=RECORD, backbone=SMALL, weights=weights)
    with torch.no_grad():
        for tensor in task.network.state_dict().values():
            tensor.add_(1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path)
    return task


@pytest.mark.parametrize("name", ["best.ckpt", "renamed.pt"])
def test_training_starts_from_a_checkpoint_of_ours_with_other_classes(tmp_path, name):
    first = checkpoint(tmp_path / name, weights=None)
    address = str(tmp_path / name)
    record = preprocessing_record(SMALL, address)
    assert record == RECORD != default_preprocessing(SMALL)

    second = ClassificationTask(classes=list("abcde"), preprocessing=record, backbone=SMALL, weights=address)

    assert_loaded(second.network, first.network.state_dict())
    assert second.network.fc.weight.shape[0] == 5
    assert torch.equal(second.mean.flatten(), torch.tensor(RECORD["mean"]))
    assert second.load_report.unwrapped == ("found in 'state_dict'",)
    assert sorted(second.load_report.skipped) == ["fc.bias", "fc.weight"]
    assert (second.lineage, first.lineage) == (Lineage(address, "scratch", None), Lineage())
    assert str(second.lineage) == f"{address} (from scratch)"


def test_origin_and_licence_are_handed_on_over_generations(tmp_path):
    published = tmp_path / "published.safetensors"
    save_weights(published, small_state(), Facts(SMALL, RECORD, LICENCE))
    addresses = [str(published), *(str(tmp_path / name) for name in ("first.ckpt", "second.ckpt", "third.ckpt"))]
    for before, after in pairwise(addresses):
        task = checkpoint(Path(after), weights=before)
        assert task.lineage == Lineage(before, addresses[0], LICENCE)
        assert task.lineage.licence_in_words == "cc-by-nc-4.0 (non-commercial)"
        assert ClassificationTask.load_from_checkpoint(after, map_location="cpu").lineage == task.lineage
        assert preprocessing_record(SMALL, after) == RECORD
        assert read_facts(Path(after)) == Facts(SMALL, RECORD, LICENCE, addresses[0])


def test_a_checkpoint_of_another_backbone_says_which(tmp_path):
    checkpoint(tmp_path / "best.ckpt", weights=None)
    address = str(tmp_path / "best.ckpt")
    assert_refused(create_backbone("resnet20", 3), address, f"made for '{SMALL}'", "missing", "unexpected")


@pytest.mark.parametrize("hparams", [{"lr": 0.1}, {"classes": ["a"], "preprocessing": {}, "backbone": "resnet18"}])
def test_a_lightning_checkpoint_of_another_project_is_a_plain_container(tmp_path, hparams):
    """Even one whose settings have the names of ours: what it started from is not said in it."""
    state, path = small_state(), tmp_path / "epoch=3.ckpt"
    tensors = {f"model.{key}": value for key, value in state.items()}
    torch.save({"state_dict": tensors, "pytorch-lightning_version": "2", "hyper_parameters": hparams}, path)
    network = create_backbone(SMALL, 3)
    report = load_pretrained(network, str(path))
    assert_loaded(network, state)
    assert report.unwrapped == ("found in 'state_dict'", "without 'model.'")
    assert report.lineage == Lineage(str(path), str(path), None)
    assert preprocessing_record(SMALL, str(path)) == default_preprocessing(SMALL)


def test_facts_and_tensors_pass_a_file_of_ours_unchanged(tmp_path):
    path, state = tmp_path / "weights.safetensors", small_state()
    facts = Facts(SMALL, RECORD, "Lizenz für Forschung (nc)", "timm/elsewhere", outputs=7)
    last = {key: value.contiguous(memory_format=torch.channels_last) for key, value in state.items() if value.ndim == 4}
    save_weights(path, {**state, **last}, facts)
    assert read_facts(path) == facts
    assert_same(dict(sorted(load_file(path).items())), dict(sorted(state.items())))
    report = load_pretrained(create_backbone(SMALL, 3), str(path))
    assert report.lineage == Lineage(str(path), "timm/elsewhere", "Lizenz für Forschung (nc)")
    assert preprocessing_record(SMALL, str(path)) == RECORD


def test_a_file_that_says_nothing_has_no_facts(tmp_path):
    for name in ("weights.safetensors", "weights.pth"):
        address = save(small_state(), tmp_path / name)
        assert read_facts(Path(address)) == Facts()
        assert preprocessing_record(SMALL, address) == default_preprocessing(SMALL)


@pytest.mark.parametrize(
    "metadata", ['{"licence": "mit"', json.dumps({"colour": "red"}), '["mit"]', "", '"mit"'], ids=range(5)
)
def test_a_file_with_damaged_facts_is_refused(tmp_path, metadata):
    path = tmp_path / "weights.safetensors"
    save_file(small_state(), path, {"transfer-pipeline": metadata})
    assert_refused(create_backbone(SMALL, 3), str(path), f"'{path}'", "cannot be read")
    with pytest.raises(UserError, match="cannot be read"):
        preprocessing_record(SMALL, str(path))


def test_a_network_is_the_same_module_after_loading(tmp_path):
    """Optimizers hold parameters by identity: loading copies values into them."""
    network: nn.Module = create_backbone(SMALL, 3)
    before = {name: id(parameter) for name, parameter in network.named_parameters()}
    load_pretrained(network, save(small_state(), tmp_path / "weights.pth"))
    assert {name: id(parameter) for name, parameter in network.named_parameters()} == before
