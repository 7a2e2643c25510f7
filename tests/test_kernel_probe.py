"""A head that answers by distances: solved on a frozen backbone, kept, tested again, gone on from, and exported."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.cli import main
from pipeline.models.kernel_head import KernelHead
from pipeline.registry.bundle import write_bundle
from pipeline.registry.inference import Bundle
from pipeline.task import ClassificationTask
from tests.images import encoded, smooth
from tests.support import fast, pretrained, runs
from tests.tagged import write_tagged


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    found = [*fast(tmp_path / "images"), *pretrained(tmp_path, per_class=16)]
    return [
        "fit",
        *found,
        "--finetuning=KernelProbe",
        f"--finetuning.features={tmp_path}/features",
        "--trainer.logger=false",
    ]


def network_of(file: Path) -> dict[str, torch.Tensor]:
    state = torch.load(file, weights_only=True)["state_dict"]
    return {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}


def metrics_of(run: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((run / "summary.json").read_text())["metrics"]
    return found


def test_the_head_knows_every_training_image_and_the_backbone_stays(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "KernelProbe: the head is solved on features of the frozen backbone, without epochs" in out
    assert "training   no epochs" in out
    (run,) = runs()
    found, loaded = network_of(run / "best.ckpt"), load_file("weights.safetensors")
    head = {name: value for name, value in found.items() if name.startswith("linear.")}
    assert set(head) == {f"linear.{name}" for name in ("centres", "mean", "deviation", "width", "weight", "bias")}
    trained_on = sum(row.split(",")[2] == "train" for row in (run / "split.csv").read_text().splitlines())
    assert head["linear.centres"].shape == (trained_on, 16 + 32 + 64)
    assert all(torch.equal(value, loaded[name]) for name, value in found.items() if name not in head)
    assert metrics_of(run)["test/accuracy"]["value"] == 1.0


def test_the_checkpoint_answers_the_same_when_tested_again_and_goes_on(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    (run,) = runs()
    told = f"log loss  {metrics_of(run)['test/log_loss']['value']:.4f}"
    capsys.readouterr()
    assert main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'best.ckpt'}"]) == 0
    assert told in capsys.readouterr().out
    assert main([*arguments, f"--ckpt_path={run / 'best.ckpt'}"]) == 0
    assert told in capsys.readouterr().out
    # Another run begins from it, whose backbone alone is of use to another strategy.
    again = [argument for argument in arguments if "finetuning" not in argument and "model.weights" not in argument]
    started = [f"--model.weights={run / 'best.ckpt'}", "--finetuning=LinearProbe", "--finetuning.features=features"]
    assert main([*again, *started]) == 0
    assert network_of(runs()[-1] / "best.ckpt")["linear.weight"].shape == (3, 16 + 32 + 64)


def test_without_validation_images_it_is_judged_by_images_that_are_left_out(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "images").rglob("*.png")):  # nothing tells the classes apart
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    assert main([argument for argument in arguments if "val_fraction" not in argument]) == 0
    assert "each judged by a head that was solved without it" in capsys.readouterr().out
    accuracy = metrics_of(runs()[0])["out_of_fold/accuracy"]
    assert accuracy["value"] < 1 / 3 + 3 * (2 / 9 / accuracy["n"]) ** 0.5 < 0.62  # three standard errors above chance
    assert metrics_of(runs()[0])["out_of_fold/log_loss"]["value"] > 0.9


def test_what_is_exported_answers_alike(arguments: list[str], tmp_path: Path) -> None:
    assert main(arguments) == 0
    task = ClassificationTask.load_from_checkpoint(runs()[0] / "best.ckpt", map_location="cpu", weights_only=True)
    assert isinstance(task.network.get_submodule(task.head), KernelHead)
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle", task, {})
    files = [encoded(Image.fromarray(smooth(32, 32, phase)), "PNG") for phase in (0.0, 1.5, 3.0)]
    images = np.stack([smooth(32, 32, phase).transpose(2, 0, 1) for phase in (0.0, 1.5, 3.0)])
    with torch.no_grad():
        expected = task.eval().answer(torch.from_numpy(images)).probabilities
    assert np.ptp(expected.numpy(), axis=0).max() > 1e-3
    np.testing.assert_allclose(Bundle(tmp_path / "bundle").predict(files).probabilities, expected, atol=1e-4)


def test_images_of_several_classes_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["blue|red", "green", "", "red", "blue", "green|red"] * 2
    folder = write_tagged(tmp_path / "tagged", {"train": labels, "val": labels, "test": labels})
    told = [argument for argument in arguments if "data.root" not in argument and "fraction" not in argument]
    assert main([*told, "--data=tests.tagged.TaggedImages", f"--data.root={folder}"]) == 2
    assert "expected images of one class each for KernelProbe" in capsys.readouterr().err
