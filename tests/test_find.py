"""``python -m pipeline find``: what is suggested, what stays as it was, and what a wrong call gets."""

import re
from pathlib import Path

import pytest
import torch

from pipeline import finding
from pipeline.cli import main
from pipeline.finding import FindCLI, one_device
from pipeline.task import ClassificationTask
from tests.support import MACHINE, pretrained


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [f"--data.root={tmp_path / 'images'}", *pretrained(tmp_path, per_class=12), *MACHINE]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FindCLI, dict[str, torch.Tensor]]]:
    """What each trial was made with, and the state of its task before."""
    made: list[tuple[FindCLI, dict[str, torch.Tensor]]] = []

    class Recorded(FindCLI):
        def fit(self, model: ClassificationTask, *_: object, **__: object) -> None:
            made.append((self, {name: tensor.clone() for name, tensor in model.state_dict().items()}))

    monkeypatch.setattr(finding, "FindCLI", Recorded)
    return made


def assert_nothing_moved(tried: list[tuple[FindCLI, dict[str, torch.Tensor]]]) -> None:
    ((cli, before),) = tried
    after = cli.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_learning_rate_is_suggested_and_the_network_is_left_as_it_was(
    arguments: list[str], tried: list[tuple[FindCLI, dict[str, torch.Tensor]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["find", "learning_rate", *arguments, "--steps=40", "--to=curve.png"]) == 0
    out = capsys.readouterr().out
    (suggested,) = re.findall(r"--model\.learning_rate=(\S+)", out)
    assert 1e-7 < float(suggested) < 1
    # Almost to the largest rate, though the plan's epochs have fewer steps.
    assert max(map(float, re.findall(r"rate (\d\S+)", out))) > 0.1
    assert re.search(r"the plan chooses \S+ for the backbone", out)
    assert_nothing_moved(tried)
    assert {path.name for path in Path().iterdir()} == {"images", "weights.safetensors", "curve.png"}


@pytest.mark.parametrize("last", [[3.0], [30.0, 20.0, 5.0]])  # it may explode, and fall from there
def test_the_rate_is_suggested_where_the_loss_falls_steepest_by_the_rates_magnitude(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: list[float]
) -> None:
    class Found:
        # The tuner's first losses are left out; then a little noise between tiny rates, and the fall that counts.
        results = {  # noqa: RUF012
            "lr": [10.0 ** (-8 + step / 4) for step in range(19 + len(last))],
            "loss": [1.0] * 10 + [2.0, 1.9999, 2.0, 2.0, 2.0, 1.8, 1.0, 0.9, 0.9] + last,
        }

    monkeypatch.setattr(finding.Tuner, "lr_find", lambda *_, **__: Found())
    assert main(["find", "learning_rate", *arguments]) == 0
    assert "--model.learning_rate=5.6e-05" in capsys.readouterr().out  # in the middle of it


def test_the_largest_batch_is_found_that_memory_holds(
    arguments: list[str],
    tried: list[tuple[FindCLI, dict[str, torch.Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = ClassificationTask.training_step

    def short_of_memory(self: ClassificationTask, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if len(batch["image"]) > 8:
            raise RuntimeError("CUDA out of memory.")
        return real(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", short_of_memory)
    assert main(["find", "batch_size", *arguments]) == 0
    out = capsys.readouterr().out
    assert "batches of 8 images fit (memory)" in out
    assert "--data.batch_size=8" in out
    assert_nothing_moved(tried)


def test_what_is_tried_is_as_large_as_the_images_become(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real, sides = ClassificationTask.training_step, set()

    def watched(self: ClassificationTask, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        sides.add(batch["image"].shape[-1])
        return real(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationTask, "training_step", watched)
    smaller = ["--data.image_size=96", "--data.reduced_epochs=2"]
    assert main(["find", "batch_size", *arguments, *smaller, "--most=8"]) == 0
    assert sides == {96}


@pytest.mark.parametrize(
    ("most", "expected"), [("1024", "16 images fit (there are 30)"), ("20", "16 images fit (more were not tried)")]
)
def test_no_more_is_tried_than_there_are_images_or_than_was_asked(
    arguments: list[str], capsys: pytest.CaptureFixture[str], most: str, expected: str
) -> None:
    assert main(["find", "batch_size", *arguments, f"--most={most}"]) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("what", ["learning_rate", "batch_size"])
def test_where_several_devices_train_one_tries(
    arguments: list[str],
    tried: list[tuple[FindCLI, dict[str, torch.Tensor]]],
    what: str,
) -> None:
    several = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.num_nodes=2", "--data.batch_size=8"]
    assert main(["find", what, *arguments, *several, *{"batch_size": ["--most=8"]}.get(what, ["--steps=30"])]) == 0
    ((cli, _),) = tried
    assert cli.trainer.world_size == 1


@pytest.mark.parametrize(
    ("given", "one"), [("auto", 1), ("-1", 1), ("3", 1), (2, 1), ("1,", [1]), ("3,1", [3]), ([2], [2]), ([2, 0], [2])]
)
def test_a_device_that_is_named_is_the_one(given: object, one: object) -> None:
    assert one_device(given) == one


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["everything"], "choose from"),
        ([], "what"),
        (["learning_rate", "--steps=3"], "--steps: expected at least 30, found 3"),
        (["batch_size", "--most=1"], "--most: expected at least 8, found 1"),
        (["learning_rate", "--to=nowhere/curve.png"], "make the folder"),
        (["learning_rate", "--to=curve.doc"], "ends in .png or .svg or .pdf, found 'curve.doc'"),
        (["batch_size", "--trainer.gradient_clip_algorithm=odd"], "trainer: expected settings that fit this machine"),
        (["learning_rate", "--finetuning=LinearProbe"], "expected a strategy that takes steps, found LinearProbe"),
    ],
)
def test_a_wrong_call_is_one_clear_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str], wrong: list[str], words: str
) -> None:
    assert main(["find", *wrong, *arguments]) == 2
    assert words in capsys.readouterr().err
