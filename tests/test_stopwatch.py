"""How long an image takes: measured without a trace, and only where the work does not simply grow with the area."""

import contextlib
from functools import partial

import pytest
import torch

from pipeline.planning import timing
from pipeline.planning.timing import Stopwatch
from pipeline.precision import computing
from pipeline.task import ClassificationTask


@pytest.fixture
def task() -> ClassificationTask:
    torch.manual_seed(0)
    return ClassificationTask(["a", "b"], {"mean": [0.5] * 3, "std": [0.25] * 3}, "resnet18")


@pytest.fixture(autouse=True)
def nothing_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_reading", lambda _: 0.001)


def stopwatch(task: ClassificationTask, frozen: tuple[str, ...] = ()) -> Stopwatch:
    return Stopwatch(task, None, 64, 4, "cpu", contextlib.nullcontext, frozen)  # type: ignore[arg-type]


def test_weights_and_statistics_are_left_as_they_were(task: ClassificationTask) -> None:
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    stopwatch(task).training(32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.network.state_dict().items())
    assert all(parameter.grad is None for parameter in task.network.parameters())


def test_smaller_images_are_measured_and_larger_ones_follow_from_the_area(
    task: ClassificationTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    real = Stopwatch._training

    def watched(self: Stopwatch, images: torch.Tensor) -> float:
        measured.append(images.shape[-1])
        return real(self, images)

    monkeypatch.setattr(Stopwatch, "_training", watched)
    watch = stopwatch(task)
    assert measured == []
    assert watch.training(128) == pytest.approx(4 * watch.training(64))
    assert watch.training(32) == watch.training(32)
    assert measured == [64, 32]
    assert watch.usual.at(32).embedding == pytest.approx(watch.usual.embedding / 4)


@pytest.mark.parametrize(("precision", "looks"), [("32-true", 1), ("bf16-mixed", 2)])
def test_looking_is_measured_in_each_precision(
    task: ClassificationTask, monkeypatch: pytest.MonkeyPatch, precision: str, looks: int
) -> None:
    measured: list[object] = []
    monkeypatch.setattr(Stopwatch, "_an_image", lambda self, step: float(len(measured.append(step) or measured)))
    watch = Stopwatch(task, None, 64, 4, "cpu", partial(computing, precision, "cpu"))  # type: ignore[arg-type]
    assert (watch.usual.answering, watch.usual.embedding) == (1, looks)


@pytest.mark.parametrize(("seconds", "timed"), [((0.2, 0.1), 2), ((3.0, 0.1), 1)])
def test_a_step_that_takes_long_is_timed_once(
    task: ClassificationTask, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], timed: int
) -> None:
    watch, left = stopwatch(task), list(seconds)
    monkeypatch.setattr(Stopwatch, "_timed", lambda self, step: left.pop(0))
    assert watch._an_image(lambda: None) == min(seconds[:timed]) / 4
    assert len(left) == 2 - timed
