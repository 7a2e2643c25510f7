"""Fine-tuning what was trained before: from the registry and from a checkpoint, with its preprocessing and licence."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient

from pipeline.cli import main
from pipeline.models.backbones import CIFAR_PREPROCESSING, create_backbone
from pipeline.models.files import Facts, save_weights
from tests.support import fast, write_images

LICENCE = "cc-by-nc-4.0"
RECORD = {**CIFAR_PREPROCESSING, "crop": 0.9, "mean": [0.4, 0.5, 0.6], "dtype": "uint8"}


class Generations:
    """A folder with a model that was fine-tuned from licensed weights and registered."""

    def __init__(self, home: Path) -> None:
        self.home = home
        write_images(home / "images", per_class=8)
        torch.manual_seed(0)
        self.weights = home / "published.safetensors"
        save_weights(
            self.weights, create_backbone("resnet20", 5).state_dict(), Facts("resnet20", RECORD, LICENCE, "somewhere")
        )
        self.first = self.fit(f"--model.weights={self.weights}", "--registered_model_name=colours")

    def fit(self, *arguments: str) -> Path:
        """Run ``fit``; the run's folder."""
        before = set((self.home / "runs").glob("*"))
        fixed = ["--model.backbone=resnet20", "--trainer.max_epochs=1", "--quiet"]
        common = [argument for argument in fast(self.home / "images") if "image_size" not in argument]
        with contextlib.chdir(self.home):
            assert main(["fit", *common, *fixed, *arguments]) == 0
        (folder,) = set((self.home / "runs").glob("*")) - before
        return folder

    def client(self, folder: Path) -> MlflowClient:
        uri = json.loads((folder / "summary.json").read_text())["tracking_uri"]
        return MlflowClient(uri, uri)


def tags(folder: Path) -> dict[str, str]:
    return json.loads((folder / "summary.json").read_text())["tags"]


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> Generations:
    return Generations(tmp_path_factory.mktemp("generations"))


def assert_same_backbone(parent: Path, child: Path) -> None:
    """After a linear probe, the child's backbone is the parent's, bit by bit."""
    expected, found = checkpoint(parent)["state_dict"], checkpoint(child)["state_dict"]
    assert list(found) == list(expected)
    moved = {name for name in found if not torch.equal(found[name], expected[name])}
    assert "network.linear.weight" in moved
    assert moved <= {"network.linear.bias", "network.linear.weight", "temperature"}


def test_the_licence_of_the_weights_is_in_the_log_the_tags_and_the_registered_model(generations, capsys):
    folder = generations.fit(f"--model.weights={generations.weights}")
    out = capsys.readouterr().out
    assert "licence    cc-by-nc-4.0 (non-commercial)" in out
    assert "95 tensors" not in out, "the file counts batches, too"
    assert "114 tensors loaded; skipped linear.bias, linear.weight" in out
    assert tags(folder)["weights_licence"] == "cc-by-nc-4.0 (non-commercial)"
    summary = json.loads((folder / "summary.json").read_text())
    tracked = generations.client(folder).get_run(summary["run_id"]).data.tags
    assert tracked["weights_licence"] == "cc-by-nc-4.0 (non-commercial)"
    assert tracked["weights"] == str(generations.weights)


def test_the_preprocessing_belongs_to_the_weights(generations):
    assert checkpoint(generations.first)["hyper_parameters"]["preprocessing"] == {**RECORD, "crop": 1.0}  # as planned


@pytest.mark.parametrize("address", ["models:/colours@challenger", "models:/colours/1"])
def test_a_registered_model_can_be_trained_further(generations, capsys, address):
    folder = generations.fit(f"--model.weights={address}", "--finetuning=LinearProbe")
    out = capsys.readouterr().out
    assert "weights    models:/colours/1 (from somewhere): 114 tensors loaded" in out
    assert "finetuning LinearProbe: the head is solved on features of the frozen backbone, without epochs" in out
    assert "training   no epochs" in out
    assert_same_backbone(generations.first, folder)
    assert checkpoint(folder)["hyper_parameters"]["preprocessing"] == {**RECORD, "crop": 1.0}  # as planned
    expected = {
        "weights": "models:/colours/1",
        "weights_origin": "somewhere",
        "weights_licence": "cc-by-nc-4.0 (non-commercial)",
        "finetuning": "LinearProbe",
    }
    assert expected.items() <= tags(folder).items()
    assert checkpoint(folder)["weights_lineage"]["licence"] == LICENCE


def test_a_checkpoint_can_be_trained_further_under_other_classes(generations, tmp_path):
    images = tmp_path / "images"
    write_images(images, per_class=8, seed=1)
    shutil.rmtree(images / "red")
    best = generations.first / "best.ckpt"
    folder = generations.fit(f"--model.weights={best}", f"--data.root={images}", "--finetuning=LinearProbe")
    assert_same_backbone(generations.first, folder)
    assert checkpoint(folder)["hyper_parameters"]["classes"] == ["blue", "green"]
    assert checkpoint(folder)["hyper_parameters"]["preprocessing"] == {**RECORD, "crop": 1.0}  # as planned
    assert tags(folder)["weights"] == str(best)
    assert tags(folder)["weights_origin"] == "somewhere"
    assert tags(folder)["weights_licence"] == "cc-by-nc-4.0 (non-commercial)"


def test_a_saved_configuration_still_tests_its_checkpoint_where_the_weights_are_gone(generations, capsys, tmp_path):
    config = yaml.safe_load((generations.first / "config.yaml").read_text())
    for weights in ("models:/gone@champion", "hf-hub:nobody/nothing", str(tmp_path / "gone.th")):
        config["model"]["weights"] = weights
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        with contextlib.chdir(generations.home):
            arguments = ["test", f"--config={tmp_path / 'config.yaml'}", f"--ckpt_path={generations.first}"]
            assert main(arguments) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("address", "texts"),
    [
        ("models:/coulors@challenger", ("models:/coulors@challenger", "did you mean colours?")),
        ("models:/colours@champion", ("its versions are 1", "its aliases challenger")),
        ("models:/colours/7", ("models:/colours/7", "its versions are 1")),
        ("models:/colours", ("models:/<name>@<alias>", "models:/<name>/<version>")),
        ("models:/colours/latest", ("models:/<name>@<alias>", "models:/<name>/<version>")),
    ],
)
def test_what_is_not_registered_is_named_with_what_is(generations, capsys, address, texts):
    with contextlib.chdir(generations.home):
        runs = set((generations.home / "runs").glob("*"))
        assert main(["fit", *fast(generations.home / "images"), f"--model.weights={address}"]) == 2
        assert set((generations.home / "runs").glob("*")) == runs
    error = capsys.readouterr().err
    for text in texts:
        assert text in error
    assert error.count("\n") == 1


def test_a_model_that_another_program_registered_is_refused(generations, capsys):
    client = generations.client(generations.first)
    client.create_registered_model("foreign")
    source = generations.home / "foreign"
    source.mkdir()
    (source / "MLmodel").write_text("flavors: {}\n")
    client.create_model_version("foreign", str(source))
    with contextlib.chdir(generations.home):
        assert main(["fit", *fast(generations.home / "images"), "--model.weights=models:/foreign/1"]) == 2
    assert "found no model.safetensors in it" in capsys.readouterr().err
