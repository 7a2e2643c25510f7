"""Plans from the command line: shown, kept, followed, repeated, and overruled by what a person sets."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.checkpoints import read_checkpoint
from pipeline.cli import main
from pipeline.planning import planner, session
from pipeline.planning.facts import Facts
from pipeline.planning.timing import Stopwatch
from pipeline.task import ClassificationTask
from tests.support import MACHINE, pretrained, runs, settings_of, write_images


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run in which everything is open that a plan can choose."""
    monkeypatch.chdir(tmp_path)
    weights = pretrained(tmp_path, per_class=12)
    return [f"--data.root={tmp_path / 'images'}", *weights, *MACHINE, "--trainer.logger=false"]


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


@pytest.mark.parametrize(
    ("told", "strategy"),
    [
        ([], "KernelProbe"),
        (["--data.train_size=64"], "KernelProbe"),
        (["--model.test_time_augmentation=flip"], "KernelProbe"),
        (["--data.orientation=any"], "FullFineTuning"),
        (["--monitor=val/macro_f1"], "FullFineTuning"),
        (["--trainer.gradient_clip_val=1"], "FullFineTuning"),
        (["--model.head_stages=1"], "FullFineTuning"),
        (["--trainer.max_epochs=9"], "FullFineTuning"),
    ],
)
def test_a_thousand_images_are_told_by_distances_unless_something_else_is_asked_for(
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: list[str],
    strategy: str,
) -> None:
    real = session.gather_facts
    monkeypatch.setattr(session, "gather_facts", lambda *given: replace(real(*given), images=1_500, validated=150))
    holds_out = "--model.test_time_augmentation=flip" in told  # which left-out images say nothing of
    assert main(["plan", *arguments, *told]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert lines["finetuning"].split()[1] == strategy
    assert lines["data.val_fraction"].split()[1] == ("0" if strategy == "KernelProbe" and not holds_out else "0.1")
    if strategy == "KernelProbe":
        assert lines["model.head_stages"].split()[1] == "3"
        assert lines["trainer.max_epochs"].split()[1] == "1"


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


def test_from_scratch_there_is_less_to_choose(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments, "--model.weights=null"]) == 0
    out = capsys.readouterr().out
    assert "there are no pretrained weights to build on" in out
    assert "from scratch there is nothing to keep" in out


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
