"""Stages join in from the head downwards; what has not joined in does not move."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pipeline.cli import main
from pipeline.finetuning import GradualUnfreezing
from pipeline.finetuning.optimization import parameter_groups
from pipeline.models.backbones import create_backbone, depth_groups
from tests.support import InterruptAt, fast, pretrained


def test_the_last_stage_joins_in_first_and_all_do_in_time() -> None:
    network = create_backbone("resnet18", 3)
    stages = [set(stage) for stage in depth_groups(network, coarse=True)[:-1]]
    strategy = GradualUnfreezing(share=0.5)
    counts = []
    for epoch in range(12):
        frozen = set(strategy.still_frozen(network, epoch, 12))
        count = sum(stage <= frozen for stage in stages)
        assert frozen == set().union(*stages[:count])
        counts.append(count)
    assert counts[0] == len(stages)
    assert counts == sorted(counts, reverse=True)
    assert counts[5:] == [0] * 7
    assert strategy.still_frozen(network, 0, 1) != []
    assert GradualUnfreezing(share=1.0).still_frozen(network, 11, 12) == []


class Seen(Callback):
    """The network at the start of each epoch, and after the last."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.network.state_dict().items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    found = [*fast(tmp_path / "images"), *pretrained(tmp_path, per_class=12)]
    chosen = ["--data.orientation=mirrored", "--model.batch_norm=batch", "--finetuning=GradualUnfreezing"]
    return ["fit", *found, *chosen, "--trainer.max_epochs=6", "--trainer.logger=false"]


def test_what_has_not_joined_in_does_not_move(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import fitting

    seen, callbacks = Seen(), fitting.Fitting.callbacks.fget
    monkeypatch.setattr(fitting.Fitting, "callbacks", property(lambda self: [*callbacks(self), seen]))
    assert main(arguments) == 0
    network = create_backbone("resnet20", 3)
    strategy = GradualUnfreezing()
    parameters = dict(network.named_parameters())
    for epoch in range(6):
        before, after = seen.states[epoch], seen.states[epoch + 1]
        frozen = strategy.still_frozen(network, epoch, 6)
        parts = {name.rpartition(".")[0] for name in frozen}
        still = [name for name in before if name in frozen or name.rpartition(".")[0] in parts]
        assert all(torch.equal(before[name], after[name]) for name in still)
        trained = [name for name in parameters if name not in frozen and before[name].numel() > 1]
        assert all(not torch.equal(before[name], after[name]) for name in trained)


def test_a_training_that_ends_before_all_have_joined_in_is_finished(arguments: list[str]) -> None:
    assert main([*arguments, "--trainer.max_epochs=1"]) == 0
    (run,) = Path("runs").iterdir()
    assert (run / "summary.json").is_file()


def test_what_moves_before_it_joins_in_is_noticed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(GradualUnfreezing, "hold", lambda self, network: None)  # statistics go on moving
    assert main(arguments) == 1
    assert "GradualUnfreezing froze" in capsys.readouterr().err
    assert not list(Path("runs").glob("*/summary.json"))


def test_a_run_that_goes_on_comes_to_the_same_network(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import fitting

    assert main(arguments) == 0
    (whole,) = Path("runs").iterdir()
    callbacks = fitting.Fitting.callbacks.fget
    with monkeypatch.context() as patch:
        interrupted = property(lambda self: [*callbacks(self), InterruptAt(step=8)])
        patch.setattr(fitting.Fitting, "callbacks", interrupted)
        assert main(arguments) == 130
    assert main([*arguments, "--ckpt_path=last"]) == 0
    (resumed,) = set(Path("runs").iterdir()) - {whole}
    first, second = (torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, resumed))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_rates_fall_by_stage_where_that_is_asked() -> None:
    network = create_backbone("resnet18", 3)
    groups = parameter_groups(network, "fc", 1e-4, 1e-3, 0.05, layer_decay=0.5)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["head"] == rates["head.no_decay"] == 1e-3
    expected = [1e-4 * 0.5 ** (4 - stage) for stage in range(5)]
    assert [rates[f"backbone{stage}"] for stage in range(5)] == pytest.approx(expected)
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    assert {group["name"] for group in parameter_groups(network, "fc", 1e-4, 1e-3, 0.05)} == {
        "backbone",
        "backbone.no_decay",
        "head",
        "head.no_decay",
    }
