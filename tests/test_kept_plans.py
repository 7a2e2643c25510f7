"""A run that goes on from a checkpoint keeps the plan, the head and the tests of the run before."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import read_checkpoint
from pipeline.cli import main
from pipeline.planning import session
from tests.support import MACHINE, pretrained, runs, settings_of


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run in which everything is open that a plan can choose."""
    monkeypatch.chdir(tmp_path)
    weights = pretrained(tmp_path, per_class=12)
    return [f"--data.root={tmp_path / 'images'}", *weights, *MACHINE, "--trainer.logger=false"]


def test_a_run_that_is_resumed_is_not_planned_again(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["fit", *arguments, "--trainer.max_epochs=1"]) == 0
    (first,) = runs()
    (first / "summary.json").unlink()  # as if it had been interrupted before its tests were over
    monkeypatch.setattr(session, "gather_facts", lambda *_: pytest.fail("planned again"))
    assert main(["fit", *arguments, "--trainer.max_epochs=1", "--ckpt_path=last"]) == 0
    assert runs() == [first]
    before = json.loads((first / "plan.json").read_text())["choices"]
    assert main(["fit", *arguments, f"--ckpt_path={first / 'last.ckpt'}", "--trainer.max_epochs=2"]) == 0
    after = json.loads((runs()[-1] / "plan.json").read_text())["choices"]
    changed = {name for name, value in settings_of(after).items() if settings_of(before)[name] != value}
    assert changed == {"trainer.max_epochs"}


def test_a_run_that_keeps_its_plan_takes_no_budget(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *arguments, "--trainer.max_epochs=1"]) == 0
    checkpoint = runs()[0] / "last.ckpt"
    assert main(["fit", *arguments, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}", "--budget=5m"]) == 2
    assert "--budget: expected none for a run that goes on from" in capsys.readouterr().err
    assert len(runs()) == 1


def test_a_checkpoint_without_its_plan_goes_on_as_it_was_trained(arguments: list[str]) -> None:
    settings = [
        "--trainer.max_epochs=1",
        "--data.crop_fraction=0.9",
        "--data.image_size=40",
        "--model.learning_rate=3e-4",
    ]
    assert main(["fit", *arguments, *settings]) == 0
    (first,) = runs()
    alone = (first / "last.ckpt").rename("moved.ckpt")
    assert main(["fit", *arguments, f"--ckpt_path={alone}", "--trainer.max_epochs=2"]) == 0
    before, after = (read_checkpoint(path)["hyper_parameters"] for path in (alone, runs()[-1] / "last.ckpt"))
    for name in ("preprocessing", "learning_rate", "head_learning_rate", "head_stages"):
        assert before[name] == after[name]
    assert before["head_stages"] == 3
    content = read_checkpoint(alone)
    del content["plan"]
    torch.save(content, "planless.ckpt")
    assert main(["fit", *arguments, "--ckpt_path=planless.ckpt", "--trainer.max_epochs=2"]) == 0
    after = read_checkpoint(runs()[-1] / "last.ckpt")["hyper_parameters"]
    assert all(before[name] == after[name] for name in ("preprocessing", "learning_rate", "head_stages"))
    torch.save(content, first / "planless.ckpt")  # a plan lies beside it, as in earlier releases
    assert main(["fit", *arguments, f"--ckpt_path={first / 'planless.ckpt'}", "--trainer.max_epochs=2"]) == 0
    plans = (json.loads((folder / "plan.json").read_text()) for folder in (first, runs()[-1]))
    kept, taken = (settings_of(plan["choices"]) for plan in plans)
    assert taken == {**kept, "trainer.max_epochs": 2}


def test_a_checkpoint_that_was_moved_keeps_its_plan_and_its_tests(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """So few images leave none for validation, which the plan says, and neither the data nor the command line."""
    assert main(["fit", *arguments, "--trainer.max_epochs=1", "--finetuning=FullFineTuning"]) == 0
    (first,) = runs()
    before = settings_of(json.loads((first / "plan.json").read_text())["choices"])
    assert before["data.init_args.val_fraction"] == 0
    moved = (first / "best.ckpt").rename("moved.ckpt")
    capsys.readouterr()
    assert main(["test", *arguments, f"--ckpt_path={moved}"]) == 0
    metrics = json.loads((first / "summary.json").read_text())["metrics"]
    assert f"log loss  {metrics['test/log_loss']['value']:.4f}" in capsys.readouterr().out
    assert main(["fit", *arguments, f"--ckpt_path={moved}", "--trainer.max_epochs=2"]) == 0
    after = settings_of(json.loads((runs()[-1] / "plan.json").read_text())["choices"])
    assert after == {**before, "trainer.max_epochs": 2}
    steps = [read_checkpoint(path)["global_step"] for path in (moved, runs()[-1] / "last.ckpt")]
    assert steps[1] == 2 * steps[0] > 0


def test_a_checkpoint_goes_on_with_the_head_that_it_has(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *arguments, "--trainer.max_epochs=1", "--model.head_stages=2"]) == 0
    command = ["fit", *arguments, "--trainer.max_epochs=2", f"--ckpt_path={runs()[0] / 'last.ckpt'}"]
    assert main([*command, "--model.head_stages=3"]) == 2
    assert "a checkpoint of model.head_stages '3', found one of '2'" in capsys.readouterr().err
    assert main(command) == 0
    assert read_checkpoint(runs()[-1] / "last.ckpt")["hyper_parameters"]["head_stages"] == 2


@pytest.mark.parametrize(("strategy", "planned"), [("FullFineTuning", True), ("ProbeThenFineTune", False)])
def test_a_checkpoint_of_an_earlier_release_goes_on_and_is_tested(
    arguments: list[str], strategy: str, planned: bool
) -> None:
    chosen = [f"--finetuning={strategy}", "--model.head_stages=1"]
    assert main(["fit", *arguments, "--trainer.max_epochs=1", *chosen]) == 0
    (first,) = runs()
    content = read_checkpoint(first / "last.ckpt")
    del content["hyper_parameters"]["head_stages"]  # what those did not know
    if planned:
        plan = json.loads(content["plan"])
        plan["choices"] = [choice for choice in plan["choices"] if choice["setting"] != "model.head_stages"]
        content["plan"] = json.dumps(plan)
    else:
        del content["plan"]
    torch.save(content, "earlier.ckpt")
    assert main(["fit", *arguments, "--ckpt_path=earlier.ckpt", "--trainer.max_epochs=2"]) == 0
    assert read_checkpoint(runs()[-1] / "last.ckpt")["hyper_parameters"]["head_stages"] == 1
    assert main(["test", f"--config={first / 'config.yaml'}", "--ckpt_path=earlier.ckpt"]) == 0
