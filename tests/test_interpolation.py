"""Between the start and the end of the training: the line, the choice on it, and the checkpoint that comes of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pipeline import fitting
from pipeline.checkpoints import CALIBRATED, INTERPOLATED, read_checkpoint
from pipeline.cli import main
from pipeline.evaluation.predictions import Predictions
from pipeline.finetuning.interpolation import SHARES, between, choose_share
from tests.support import InterruptAt, fast, pretrained

START = {"w": torch.tensor([0.0, 2.0]), "count": torch.tensor(3)}
END = {"w": torch.tensor([1.0, 4.0]), "count": torch.tensor(8)}


@pytest.mark.parametrize("share", SHARES)
def test_tensors_lie_on_the_line_and_counts_are_those_of_the_end(share: float) -> None:
    found = between(START, END, share)
    torch.testing.assert_close(found["w"], torch.tensor([share, 2 + 2 * share]))
    assert found["count"] == 8


def right_answers(share: float, best: float, images: int) -> Predictions:
    """Answers that are right the more often the nearer ``share`` is to ``best``."""
    wrong = round(images * min(0.9, 0.05 + abs(share - best)))
    targets = np.array([1] * wrong + [0] * (images - wrong))
    return Predictions(targets, np.tile([0.9, 0.1], (images, 1)))


@pytest.mark.parametrize("best", SHARES)
def test_many_images_choose_the_share_that_answers_best(best: float) -> None:
    found = choose_share(START, END, lambda state: right_answers(float(state["w"][0]), best, 400))
    assert found == best


def test_no_further_point_is_tried_than_where_it_gets_worse() -> None:
    tried: list[float] = []

    def predict(state: dict[str, torch.Tensor]) -> Predictions:
        tried.append(float(state["w"][0]))
        return right_answers(tried[-1], 0.75, 400)

    assert choose_share(START, END, predict) == 0.75
    assert tried == [1.0, 0.75, 0.5]


def test_a_few_images_do_not_lead_to_an_extreme() -> None:
    unsure = Predictions(np.array([0, 1, 0]), np.array([[0.6, 0.4], [0.4, 0.6], [0.6, 0.4]]))
    surer = Predictions(np.array([0, 1, 0]), np.array([[0.62, 0.38], [0.38, 0.62], [0.62, 0.38]]))
    assert choose_share(START, END, lambda state: surer if state["w"][0] == 1 else unsure) == 0.75


def test_each_class_of_an_image_says_something() -> None:
    """An image with ten answers says as much of the share as ten images."""

    def of_several(state: dict[str, torch.Tensor]) -> Predictions:
        alone = right_answers(float(state["w"][0]), 1.0, 400)
        present = alone.probabilities[:, 1].reshape(40, 10)
        return Predictions(alone.targets.reshape(40, 10), present, multi_label=True)

    assert choose_share(START, END, of_several) == 1.0


def test_answers_that_are_too_sure_are_judged_as_they_will_be_given() -> None:
    """Temperature takes certainty out later: it must not decide which network is better."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 300)

    def predict(state: dict[str, torch.Tensor]) -> Predictions:
        end = float(state["w"][0]) == 1
        wrong, sure = (0.10, 0.9999) if end else (0.15, 0.8)
        label = np.where(np.arange(300) < 300 * wrong, 1 - targets, targets)
        probability = np.where(label == 1, sure, 1 - sure)
        return Predictions(targets, np.stack([1 - probability, probability], 1))

    assert choose_share(START, END, predict) == 1.0


# In a run


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    weights = pretrained(tmp_path, per_class=16)
    features = ["--finetuning=ProbeThenFineTune", f"--finetuning.features={tmp_path}/features"]
    return ["fit", *fast(tmp_path / "images"), *weights, *features, "--trainer.max_epochs=2", "--trainer.logger=false"]


class First(Callback):
    """Keeps the network that the first step finds."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self.state = {name: value.clone() for name, value in pl_module.network.state_dict().items()}


def test_the_best_checkpoint_lies_where_it_says(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = First()
    monkeypatch.setattr(fitting.Fitting, "callbacks", property(add(fitting.Fitting.callbacks.fget, first)))
    assert main(arguments) == 0
    (folder,) = Path("runs").iterdir()
    best, last = read_checkpoint(folder / "best.ckpt"), read_checkpoint(folder / "last.ckpt")
    share = best[INTERPOLATED]
    assert share in SHARES
    assert best[CALIBRATED]
    end = {name.removeprefix("network."): t for name, t in last["state_dict"].items() if name.startswith("network.")}
    for name, tensor in between(first.state, end, share).items():
        torch.testing.assert_close(best["state_dict"][f"network.{name}"], tensor)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["chosen"].startswith(f"{share:.0%} of the way from the solved head to the last epoch")
    assert not (folder / "start.safetensors").exists()


def test_without_it_the_best_epoch_is_taken(arguments: list[str]) -> None:
    assert main([*arguments, "--finetuning.interpolate=false", "--monitor=val/accuracy"]) == 0
    (folder,) = Path("runs").iterdir()
    assert INTERPOLATED not in read_checkpoint(folder / "best.ckpt")
    assert json.loads((folder / "summary.json").read_text())["chosen"].startswith("best checkpoint by val/")


def test_an_interrupted_run_comes_to_the_same_checkpoint(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(arguments) == 0
    (whole,) = Path("runs").iterdir()
    callbacks = fitting.Fitting.callbacks.fget
    with monkeypatch.context() as patch:
        patch.setattr(fitting.Fitting, "callbacks", property(add(callbacks, InterruptAt(step=5))))
        assert main(arguments) == 130
    assert main([*arguments, "--ckpt_path=last"]) == 0
    (resumed,) = set(Path("runs").iterdir()) - {whole}
    first, second = (read_checkpoint(folder / "best.ckpt") for folder in (whole, resumed))
    assert first[INTERPOLATED] == second[INTERPOLATED]
    for name, tensor in first["state_dict"].items():
        # The temperature is searched for up to 1e-4.
        tolerance = 1e-3 if name == "temperature" else 0.0
        torch.testing.assert_close(tensor, second["state_dict"][name], atol=tolerance, rtol=0.0)


def test_a_run_stopped_after_its_checkpoint_was_made_makes_it_once(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def stopped(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(fitting.Fitting, "_conclude", stopped)
        assert main(arguments) == 130
    (folder,) = Path("runs").iterdir()
    before = read_checkpoint(folder / "best.ckpt")
    monkeypatch.setattr("pipeline.finishing.choose_share", lambda *_: pytest.fail("it was chosen again"))
    assert main([*arguments, "--ckpt_path=last"]) == 0
    after = read_checkpoint(folder / "best.ckpt")
    assert all(torch.equal(tensor, after["state_dict"][name]) for name, tensor in before["state_dict"].items())


def add(callbacks: Any, other: Callback) -> Any:
    return lambda self: [*callbacks(self), other]
