"""Everything is trained but the first stages that are to stay: what moves, what is logged, and going on."""

import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from pipeline.cli import main
from pipeline.finetuning.freezing import early_parameters
from pipeline.models.backbones import create_backbone
from tests.support import fast, pretrained, runs


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    chosen = ["--data.orientation=mirrored", "--finetuning=FullFineTuning", "--trainer.max_epochs=2"]
    return ["fit", *fast(tmp_path / "images"), *pretrained(tmp_path, per_class=12), *chosen]


def trained(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


def unchanged(run: Path) -> set[str]:
    """Names of parameters of the backbone that are bit for bit as the weights brought them."""
    brought, found = load_file("weights.safetensors"), trained(run)
    names = [name for name, _ in create_backbone("resnet20", 3).named_parameters() if not name.startswith("linear")]
    return {name for name in names if torch.equal(brought[name], found[name])}


def logged(run: Path) -> dict[str, float]:
    summary = json.loads((run / "summary.json").read_text())
    client = MlflowClient(summary["tracking_uri"], summary["tracking_uri"])
    return client.get_run(summary["run_id"]).data.metrics


def test_everything_moves_unless_the_first_stages_are_to_stay(arguments: list[str]) -> None:
    assert main(arguments) == 0
    assert unchanged(runs()[-1]) == set()
    assert logged(runs()[-1])["train/frozen_unchanged"] == 0
    assert main([*arguments, "--finetuning.freeze_early=0.07"]) == 0
    early = early_parameters(create_backbone("resnet20", 3), 0.07)
    assert unchanged(runs()[-1]) == set(early) != set()
    statistics = [name for name in load_file("weights.safetensors") if name.startswith(("bn1.", "layer1."))]
    assert logged(runs()[-1])["train/frozen_unchanged"] >= len(statistics)


def test_what_should_have_stayed_and_moved_ends_the_run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Frozen parameters alone, while their normalisations go on moving.
    monkeypatch.setattr("pipeline.finetuning.strategy.hold_still", lambda network: None)
    assert main([*arguments, "--finetuning.freeze_early=true"]) == 1
    assert "FullFineTuning froze" in capsys.readouterr().err
    assert not (runs()[-1] / "summary.json").exists()


def test_a_run_that_goes_on_comes_to_the_same_network(arguments: list[str]) -> None:
    arguments += ["--finetuning.freeze_early=true", "--trainer.logger=false"]
    assert main(arguments) == 0
    whole = runs()[-1]
    interrupting = ["--trainer.callbacks=tests.support.InterruptAt", "--trainer.callbacks.step=4"]
    assert main([*arguments, *interrupting]) == 130
    assert main([*arguments, *interrupting, "--ckpt_path=last"]) == 0
    resumed = runs()[-1]
    assert resumed != whole
    first, second = trained(whole), trained(resumed)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
