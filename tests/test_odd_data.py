"""Data at the edges of what is usual: a run that works, or one clear error."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.cli import main
from pipeline.models.backbones import create_backbone
from tests.support import MACHINE


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    save_file(create_backbone("resnet20", 10).state_dict(), tmp_path / "weights.safetensors")
    network = ["--model.backbone=resnet20", f"--model.weights={tmp_path / 'weights.safetensors'}"]
    return ["fit", "--data.root=images", *network, *MACHINE, "--trainer.logger=false", "--trainer.max_epochs=1"]


def draw(counts: dict[str, int], side: int = 12) -> None:
    """``images/<class>/<number>.png``, each class of its own shade."""
    rng = np.random.default_rng(0)
    for shade, (name, count) in enumerate(counts.items()):
        folder = Path("images", name)
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 60, (side, side, 3)) + 190 * shade // max(1, len(counts) - 1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


def summary() -> dict:
    (folder,) = Path("runs").iterdir()
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("classes", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_very_many_classes_of_three_images(arguments: list[str], classes: int) -> None:
    draw({f"{number:04}": 3 for number in range(classes)}, side=8)
    assert main(arguments) == 0
    assert len(summary()["classes"]) == classes
    assert 0 <= summary()["metrics"]["test/accuracy"]["value"] <= 1


def test_a_class_a_hundred_times_as_large_as_the_other(arguments: list[str]) -> None:
    draw({"common": 400, "rare": 4})
    assert main([*arguments, "--data.val_fraction=0.2"]) == 0
    assert summary()["tags"]["monitor"] == "val/macro_f1"


def test_two_images_of_each_class(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    draw({"a": 2, "b": 2})
    assert main(arguments) == 2
    assert "at least 3 images of class 'a' to divide among train, val and test, found 2" in capsys.readouterr().err
    assert main([*arguments, "--data.val_fraction=0"]) == 0  # one trains, one tests
