"""A budget on the command line: told, kept by what was measured, and by one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from pipeline.cli import main
from pipeline.planning import planner, session
from pipeline.planning.budget import LINEAR, Budget, Fitted
from tests.support import MACHINE, pretrained, write_images


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run in which everything is open that a plan can choose."""
    monkeypatch.chdir(tmp_path)
    weights = pretrained(tmp_path, per_class=12)
    return [f"--data.root={tmp_path / 'images'}", *weights, *MACHINE, "--trainer.logger=false"]


def test_a_budget_is_kept_and_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments, "--budget=30m", "--model.learning_rate=1e-4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("expected to take ")
    long = int(next(line for line in out.splitlines() if "trainer.max_epochs" in line).split()[1])
    assert main(["plan", *arguments, "--budget=1s"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --budget: expected at least ")
    assert "found 1 s" in error
    assert long > 20  # more than without a budget, where there are so few images


def test_a_fresh_head_that_just_fits_is_not_passed_over_for_what_solving_one_takes(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(*_: object, solving: int, **__: object) -> Fitted:
        return Fitted(train_size=96, epochs=0 if solving else 400, seconds=60.0)

    monkeypatch.setattr(Budget, "fit", fit)
    assert main(["plan", *arguments, "--budget=1m", "--model.learning_rate=1e-4"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert lines["finetuning"].split()[1] == "FullFineTuning"
    assert lines["trainer.max_epochs"].split()[1] == "400"


def test_who_asks_for_training_gets_no_head_alone_for_want_of_time(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[bool] = []

    def fit(*_: object, suffices: bool = False, **__: object) -> Fitted:
        allowed.append(suffices)
        return Fitted(train_size=96, epochs=400, seconds=60.0)

    monkeypatch.setattr(Budget, "fit", fit)
    assert main(["plan", *arguments, "--budget=1m", "--trainer.max_epochs=90"]) == 0
    assert main(["plan", *arguments, "--budget=1m", "--model.learning_rate=1e-4"]) == 0
    assert not any(allowed)
    many = [argument for argument in arguments if not argument.startswith("--data.root")]
    write_images(Path("more"), per_class=40, size=8)  # enough for a fresh head to be trained, without a budget
    assert main(["plan", *many, "--data.root=more", "--data.orientation=mirrored", "--budget=1m"]) == 0
    assert any(allowed)


def test_time_is_measured_on_the_steps_that_will_be_trained(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, str]] = []

    class Watched(planner.Stopwatch):
        def __init__(self, *given: Any, **named: Any) -> None:
            measured.append(given[3:5])
            super().__init__(*given, **named)

    monkeypatch.setattr(planner, "Stopwatch", Watched)
    assert main(["plan", *arguments, "--budget=30m", "--data.batch_size=5"]) == 0
    assert measured == [(5, "cpu")]


def test_more_time_buys_a_head_by_distances_more_pixels(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = session.gather_facts
    large = {"images": 1_500, "validated": 150, "short_side": 384, "weights_size": 224}
    monkeypatch.setattr(session, "gather_facts", lambda *given: replace(real(*given), **large))

    def planned(*told: str) -> tuple[str, ...]:
        assert main(["plan", *arguments, *told]) == 0
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
        names = ("finetuning", "data.val_fraction", "data.train_size", "trainer.max_epochs")
        return tuple(lines[name].split()[1] for name in names)

    assert planned() == planned("--budget=60m") == ("KernelProbe", "0", "224", "1")
    monkeypatch.setattr(Budget, "_expected", lambda _, train_size, *__: 20.0 if train_size <= 128 else 60.0)
    assert planned("--budget=30s") == ("KernelProbe", "0", "128", "1")
    # A linear head is solved sooner.
    monkeypatch.setattr(Budget, "_expected", lambda budget, *_: 20.0 + 10 * (budget.head > LINEAR[0]))
    assert planned("--budget=25s") == ("LinearProbe", "0.1", "224", "1")
    assert main(["plan", *arguments, "--budget=25s", "--finetuning=KernelProbe"]) == 2
    assert "--budget: expected at least" in capsys.readouterr().err


def test_a_written_plan_is_not_measured_once_more(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*arguments, "--trainer.max_epochs=1", "--budget=30m"]
    assert main(["plan", *command, "--to=plan.yaml"]) == 0
    monkeypatch.setattr(planner, "Stopwatch", lambda *_, **__: pytest.fail("measured again"))
    assert main(["fit", *command, "--config=plan.yaml"]) == 0


def test_from_scratch_no_time_makes_images_larger_than_they_are(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments, "--model.backbone=resnet18", "--model.weights=null", "--budget=30m"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert lines["data.train_size"].split()[1] == "64"  # of 40


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"TORCHELASTIC_RUN_ID": "x"}, []),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, []),
        ({}, ["--trainer.num_nodes=2"]),
    ],
)
def test_processes_started_together_cannot_each_measure(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    told: list[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["fit", *arguments, *told, "--budget=30m"]) == 2
    assert "--budget: expected one process that measures" in capsys.readouterr().err
    # What the error asks for can be done in the same place.
    assert main(["plan", *arguments, *told, "--budget=30m", "--to=plan.yaml"]) == 0


@pytest.mark.parametrize(("tasks", "job"), [("1", "train"), ("4", "bash")])  # one task; a shell in an allocation
def test_one_process_of_a_cluster_may_measure(monkeypatch: pytest.MonkeyPatch, tasks: str, job: str) -> None:
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    monkeypatch.setenv("SLURM_JOB_NAME", job)
    session.require_one_process(Namespace(num_nodes=1))
