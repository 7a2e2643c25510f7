"""Which epoch becomes the best checkpoint: the last one, unless an earlier one is better by more than chance."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from pipeline import fitting
from pipeline.checkpoints import CALIBRATED, PASSED_OVER, read_checkpoint
from pipeline.cli import main
from tests.support import fast, pretrained


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    weights = pretrained(tmp_path, per_class=40)
    told = ["--finetuning=FullFineTuning", "--trainer.max_epochs=3", "--trainer.logger=false"]
    return ["fit", *fast(tmp_path / "images"), *weights, *told]


@pytest.fixture
def unmoved(arguments: list[str]) -> list[str]:
    """Every epoch answers alike, and the first one to have the best metric is the first one."""
    return [*arguments, "--model.learning_rate=1e-12", "--model.head_learning_rate=1e-12"]


class RuinAt(Callback):
    """Before the validation of an epoch, the network forgets what it knew."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch and not trainer.sanity_checking and trainer.state.fn == "fit":
            torch.nn.init.zeros_(pl_module.network.get_submodule(pl_module.head).weight)


def ruined(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    callbacks = fitting.Fitting.callbacks.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(fitting.Fitting, "callbacks", property(lambda self: [RuinAt(epoch), *callbacks(self)]))


def outcome() -> tuple[str, dict[str, Any], dict[str, Any]]:
    (folder,) = Path("runs").iterdir()
    best, last = (read_checkpoint(folder / name) for name in ("best.ckpt", "last.ckpt"))
    return json.loads((folder / "summary.json").read_text())["chosen"], best, last


def test_an_earlier_epoch_that_wins_by_chance_gives_way_to_the_last_one(unmoved: list[str]) -> None:
    assert main(unmoved) == 0
    chosen, best, last = outcome()
    assert chosen == "last epoch (epoch 1 has the best val/accuracy, within chance)"
    assert best["epoch"] == 2
    assert best[PASSED_OVER] == 1
    assert best[CALIBRATED]
    for name, tensor in last["state_dict"].items():
        assert name == "temperature" or torch.equal(best["state_dict"][name], tensor), name


def test_an_earlier_epoch_that_is_better_stays(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ruined(monkeypatch, epoch=2)
    assert main([*arguments, "--model.head_learning_rate=0.01"]) == 0
    chosen, best, last = outcome()
    assert chosen == "best checkpoint by val/accuracy"
    assert best["epoch"] < 2
    assert best["state_dict"]["network.linear.weight"].abs().sum() > 0
    assert last["state_dict"]["network.linear.weight"].abs().sum() == 0


@pytest.mark.parametrize("told", ["--monitor=val/accuracy", "--patience=5"])
def test_who_says_how_to_choose_gets_that_epoch(told: str, unmoved: list[str]) -> None:
    assert main([*unmoved, told]) == 0
    chosen, best, _ = outcome()
    assert chosen == "best checkpoint by val/accuracy"
    assert best["epoch"] == 0


def test_a_run_stopped_after_it_chose_tells_the_same(unmoved: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Fitting, "_calibrate", stopped)
        assert main(unmoved) == 130
    assert main([*unmoved, "--ckpt_path=last"]) == 0
    chosen, best, _ = outcome()
    assert chosen.startswith("last epoch (epoch 1 has")
    assert best["epoch"] == 2
