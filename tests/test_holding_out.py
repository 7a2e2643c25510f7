"""Few images are not held out for validation: all but those that test are trained on."""

import json
from pathlib import Path

import pytest

from pipeline.cli import main
from tests.support import fast, pretrained


def given(images: Path) -> list[str]:
    """Arguments of a small run in which it is open whether images are held out."""
    return [argument for argument in fast(images) if "val_fraction" not in argument]


def test_few_images_are_all_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = [*pretrained(tmp_path, per_class=10), "--data.orientation=mirrored", "--trainer.max_epochs=2"]
    assert main(["fit", *given(tmp_path / "images"), *chosen]) == 0
    printed = capsys.readouterr().out
    assert "split      train 24, val 0, test 6" in printed
    assert "monitor    none: nothing is held out" in printed
    (folder,) = Path("runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["chosen"] == "65% of the way from the solved head to the last epoch, as usual"
    assert summary["temperature"] == 1.15
    assert {name.partition("/")[0] for name in summary["metrics"]} == {"test"}
    assert summary["images_per_second"] > 0
    # The written plan makes the same run, and its evaluation is asked of the same images.
    config, best = folder / "config.yaml", folder / "best.ckpt"
    assert main(["test", f"--config={config}", f"--ckpt_path={best}"]) == 0
    accuracy = summary["metrics"]["test/accuracy"]["value"]
    assert f"accuracy  {accuracy:.4f}" in capsys.readouterr().out
    assert main(["validate", f"--config={config}", f"--ckpt_path={best}"]) == 2
    assert "validate: expected validation images, found none" in capsys.readouterr().err
    assert main(["fit", f"--config={config}", "--patience=3"]) == 2
    assert "patience: expected validation images" in capsys.readouterr().err


def test_what_is_trained_on_all_images_hands_over_the_last_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = [*pretrained(tmp_path, per_class=10), "--data.orientation=mirrored", "--finetuning=FullFineTuning"]
    assert main(["fit", *given(tmp_path / "images"), *chosen, "--trainer.max_epochs=1"]) == 0
    (folder,) = Path("runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["chosen"], summary["temperature"]) == ("the last checkpoint", 1.0)


def test_who_names_a_metric_wants_images_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = [*pretrained(tmp_path, per_class=10), "--data.orientation=mirrored", "--monitor=val/loss"]
    assert main(["fit", *given(tmp_path / "images"), *chosen, "--trainer.max_epochs=1"]) == 0
    printed = capsys.readouterr().out
    assert "split      train 21, val 3, test 6" in printed
    assert "monitor    val/loss" in printed
