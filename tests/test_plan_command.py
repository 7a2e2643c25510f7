"""Plans from the command line: shown, kept, followed, repeated, and overruled by what a person sets."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace

from pipeline.checkpoints import read_checkpoint
from pipeline.cli import main
from pipeline.planning import planner, session
from pipeline.planning.budget import Budget, Fitted
from pipeline.planning.facts import Facts
from pipeline.planning.timing import Stopwatch
from pipeline.task import ClassificationTask
from tests.support import MACHINE, pretrained, write_images


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run in which everything is open that a plan can choose."""
    monkeypatch.chdir(tmp_path)
    weights = pretrained(tmp_path, per_class=12)
    return [f"--data.root={tmp_path / 'images'}", *weights, *MACHINE, "--trainer.logger=false"]


def runs() -> list[Path]:
    return sorted(Path("runs").iterdir(), key=lambda folder: folder.stat().st_mtime)


def settings_of(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {choice["setting"]: choice["value"] for choice in choices}


def test_it_shows_every_choice_and_trains_nothing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments, "--trainer.max_epochs=5"]) == 0
    out = capsys.readouterr().out
    for words in ("finetuning", "ProbeThenFineTune", "arXiv:2202.10054", "trainer.max_epochs", "model.learning_rate"):
        assert words in out
    assert "set by you" in next(line for line in out.splitlines() if "trainer.precision" in line)
    assert not Path("runs").exists()


def test_what_is_set_wins_and_is_shown_as_set(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments, "--data.batch_size=4", "--finetuning=FullFineTuning"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert lines["data.batch_size"].split()[1:] == ["4", "set", "by", "you"]
    assert lines["finetuning"].split()[1:] == ["FullFineTuning", "set", "by", "you"]
    assert "batches of 4 are too small" in lines["model.batch_norm"]  # later choices follow it
    assert "a fresh head" in lines["model.head_learning_rate"]


@pytest.mark.parametrize("budget", [[], ["--budget=20m"]])
@pytest.mark.parametrize(("epochs", "strategy"), [(2, "ProbeThenFineTune"), (400, "FullFineTuning")])
def test_a_head_is_solved_unless_enough_images_pass(
    arguments: list[str], capsys: pytest.CaptureFixture[str], epochs: int, strategy: str, budget: list[str]
) -> None:
    assert main(["plan", *arguments, f"--trainer.max_epochs={epochs}", *budget]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert lines["finetuning"].split()[1] == strategy
    assert lines["model.head_stages"].split()[1] == {"ProbeThenFineTune": "3", "FullFineTuning": "1"}[strategy]


@pytest.mark.parametrize(
    ("backbone", "statistics"), [("timm/test_efficientnet", "stored"), ("timm/test_resnet", "batch")]
)
def test_statistics_behind_depthwise_convolutions_stay(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    backbone: str,
    statistics: str,
) -> None:
    timed: list[bool] = []

    class Watched(Stopwatch):
        def __init__(self, *given: Any, stored: bool) -> None:
            timed.append(stored)
            super().__init__(*given, stored=stored)

    monkeypatch.setattr(planner, "Stopwatch", Watched)
    (tmp_path / "others").mkdir()
    network = pretrained(tmp_path / "others", per_class=1, backbone=backbone)
    assert main(["plan", *arguments, *network, "--finetuning=FullFineTuning", "--budget=20m"]) == 0
    assert timed == [statistics == "stored"]
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert lines["model.batch_norm"].split()[1] == statistics


@pytest.mark.parametrize("budget", [[], ["--budget=20m"]])
@pytest.mark.parametrize(
    "told", ["--trainer.max_epochs=5", "--model.learning_rate=1e-4", "--model.mixing=mixup", "--patience=5"]
)
def test_few_images_are_left_to_the_head_unless_training_is_asked_for(
    arguments: list[str], capsys: pytest.CaptureFixture[str], told: str, budget: list[str]
) -> None:
    def planned(*told: str) -> str:
        assert main(["plan", *arguments, *told, *budget]) == 0
        lines = capsys.readouterr().out.splitlines()
        return next(line for line in lines if line.startswith("  finetuning"))

    alone, trained = planned(), planned(told)
    assert "LinearProbe" in alone
    assert "too few to teach the network more" in alone
    assert main(["plan", *arguments, *budget, "--to=alone.yaml"]) == 0
    planned_alone = yaml.safe_load(Path("alone.yaml").read_text())
    assert planned_alone["finetuning"]["init_args"] == {"turned": True}
    assert planned_alone["data"]["init_args"]["orientation"] in ("upright", "mirrored", "flipped", "any")
    assert "LinearProbe" not in trained


def test_crops_are_chosen_for_the_standard_augmentation_alone(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments, "--trainer.max_epochs=4"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert lines["data.smallest_crop"].split()[1:4] == ["0.5", "4", "passes:"]
    assert (
        main(["plan", *arguments, "--trainer.max_epochs=4", "--data.train_transforms=strong"]) == 0
    )  # another says itself how it crops
    assert "data.smallest_crop" not in capsys.readouterr().out


def test_training_begins_with_smaller_images_only_where_everything_is_trained_for_long(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*told: str) -> str | None:
        assert main(["plan", *arguments, "--data.image_size=96", *told]) == 0
        lines = capsys.readouterr().out.splitlines()
        return next((line.split()[1] for line in lines if line.startswith("  data.reduced_epochs")), None)

    fresh = "--finetuning=FullFineTuning"
    assert planned(fresh, "--trainer.max_epochs=14") == "7"
    assert planned(fresh, "--trainer.max_epochs=8", "--data.reduced_epochs=1") == "1"
    assert planned(fresh, "--trainer.max_epochs=14", "--budget=20m") == "0"
    assert planned(fresh, "--trainer.max_epochs=4") == "0"
    assert planned("--finetuning=ProbeThenFineTune", "--trainer.max_epochs=14") is None
    assert planned(fresh, "--trainer.max_epochs=14", "--model.weights=null") is None


def test_fit_does_what_was_planned_and_its_configuration_repeats_it(arguments: list[str]) -> None:
    arguments = [*arguments, "--trainer.max_epochs=2"]
    assert main(["plan", *arguments, "--to=plan.yaml"]) == 0
    planned = yaml.safe_load(Path("plan.yaml").read_text())
    assert main(["fit", *arguments]) == 0
    (first,) = runs()
    config = yaml.safe_load((first / "config.yaml").read_text())
    for name, value in planned["data"]["init_args"].items():
        assert config["data"]["init_args"][name] == value
    kept = json.loads((first / "plan.json").read_text())["choices"]
    assert settings_of(kept)["trainer.max_epochs"] == 2
    assert {choice["setting"] for choice in kept if choice["by_user"]} == {"trainer.precision", "trainer.max_epochs"}
    assert main(["fit", f"--config={first / 'config.yaml'}"]) == 0
    second = runs()[-1]
    assert second != first
    same, again = (read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in (first, second))
    assert all(torch.equal(value, again[name]) for name, value in same.items())
    assert all(choice["by_user"] for choice in json.loads((second / "plan.json").read_text())["choices"])


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


def test_from_scratch_there_is_less_to_choose(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments, "--model.weights=null"]) == 0
    out = capsys.readouterr().out
    assert "there are no pretrained weights to build on" in out
    assert "from scratch there is nothing to keep" in out


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


def test_a_plan_is_made_on_the_device_that_trains(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = session.gather_facts
    monkeypatch.setattr(
        session, "gather_facts", lambda *given: replace(real(*given), device="cuda", first_device="cuda:1")
    )
    devices: list[str] = []

    class OnlyAskedError(Exception):
        """There is no such device here."""

    def asked(*given: Any, **_: Any) -> None:
        devices.append(given[4])
        raise OnlyAskedError

    monkeypatch.setattr(planner, "Stopwatch", asked)
    assert main(["plan", *arguments, "--budget=30m"]) == 1

    def moved(self: ClassificationTask, device: str) -> None:
        devices.append(device)
        raise OnlyAskedError

    monkeypatch.setattr(ClassificationTask, "to", moved)
    assert main(["plan", *arguments]) == 1
    assert devices == ["cuda:1", "cuda:1"]


def test_batches_that_the_trainer_accumulates_are_known(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real, known = session.gather_facts, []

    def gathered(*given: Any) -> Facts:
        known.append(real(*given))
        return known[0]

    monkeypatch.setattr(session, "gather_facts", gathered)
    assert main(["plan", *arguments, "--trainer.accumulate_grad_batches=2", "--data.orientation=mirrored"]) == 0
    assert known[0].batches == 2


def test_a_written_plan_is_not_measured_once_more(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*arguments, "--trainer.max_epochs=1", "--budget=30m"]
    assert main(["plan", *command, "--to=plan.yaml"]) == 0
    monkeypatch.setattr(planner, "Stopwatch", lambda *_, **__: pytest.fail("measured again"))
    assert main(["fit", *command, "--config=plan.yaml"]) == 0


def test_a_run_that_keeps_its_plan_takes_no_budget(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *arguments, "--trainer.max_epochs=1"]) == 0
    checkpoint = runs()[0] / "last.ckpt"
    assert main(["fit", *arguments, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}", "--budget=5m"]) == 2
    assert "--budget: expected none for a run that goes on from" in capsys.readouterr().err
    assert len(runs()) == 1


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


def test_the_command_that_is_told_can_be_pasted(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("images").rename("my images")
    spaced = ["--data.root=my images", *arguments[1:], "--model.weights=null"]
    assert main(["plan", *spaced, "--to=my plan.yaml"]) == 0
    (told,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("to train so"))
    assert shlex.split(told)[3:] == ["python", "-m", "pipeline", "fit", *spaced, "--config", "my plan.yaml"]


def test_a_plan_needs_a_folder_to_be_written_to(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments, "--to=nowhere/plan.yaml"]) == 2
    assert "--to: expected a file in an existing folder" in capsys.readouterr().err


@pytest.mark.parametrize("counts", [{"a": 6, "b": 6}, {"a": 120, "b": 4}])
def test_few_images_and_very_uneven_classes_get_a_plan_that_trains(
    image_folder: Any, counts: dict[str, int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(counts, "few")
    few = [argument for argument in arguments if not argument.startswith("--data.root")]
    assert main(["fit", f"--data.root={root}", *few, "--trainer.max_epochs=1"]) == 0
    assert "test: " in capsys.readouterr().out


def test_images_smaller_than_the_network_are_enlarged(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "small", per_class=8, size=12)
    few = [argument for argument in arguments if not argument.startswith("--data.root")]
    assert main(["fit", f"--data.root={tmp_path / 'small'}", *few, "--trainer.max_epochs=1"]) == 0
    assert "input 32x32" in capsys.readouterr().out


def test_one_class_is_no_classification(
    image_folder: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    few = [argument for argument in arguments if not argument.startswith("--data.root")]
    assert main(["plan", f"--data.root={image_folder({'only': 6}, 'one')}", *few]) == 2
    assert "expected images of at least 2 classes" in capsys.readouterr().err


def test_unreadable_images_are_in_nobody_s_way(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("000", "003", "007"):
        Path("images/red", f"{name}.png").write_bytes(b"no picture")
    assert (
        main(["fit", *arguments, "--data.unreadable=skip", "--finetuning=FullFineTuning", "--trainer.max_epochs=1"])
        == 0
    )
    out = capsys.readouterr().out
    assert "not tried, because there are unreadable images" in " ".join(out.split())
    assert "skipped    3 images that cannot be read" in out
    assert main(["fit", *arguments]) == 2
    assert "found 3 that cannot" in capsys.readouterr().err


def test_where_nothing_can_be_kept_turns_are_not_tried(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    assert main(["plan", *arguments]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "mirrored what is common for photographs; not tried, because features cannot be kept in" in out
    assert "set XDG_CACHE_HOME, or" in out


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
