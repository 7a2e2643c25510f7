"""How long an image takes: measured without a trace, and only where the work does not simply grow with the area."""

import contextlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.planning import timing
from pipeline.planning.timing import Stopwatch
from pipeline.precision import computing
from pipeline.task import ClassificationTask

# Of which two processes read for each that trains.
DATA: Any = SimpleNamespace(workers=lambda processes: 2)


@pytest.fixture
def task() -> ClassificationTask:
    torch.manual_seed(0)
    return ClassificationTask(["a", "b"], {"mean": [0.5] * 3, "std": [0.25] * 3}, "resnet18")


@pytest.fixture(autouse=True)
def nothing_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_reading", lambda _: 0.001)


def stopwatch(task: ClassificationTask, frozen: tuple[str, ...] = ()) -> Stopwatch:
    return Stopwatch(task, DATA, 64, 4, "cpu", 1, contextlib.nullcontext, frozen)


def test_weights_and_statistics_are_left_as_they_were(task: ClassificationTask) -> None:
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    stopwatch(task).training(32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.network.state_dict().items())
    assert all(parameter.grad is None for parameter in task.network.parameters())


@pytest.mark.parametrize("stored", [True, False])
def test_a_step_is_measured_with_the_statistics_that_training_uses(task: ClassificationTask, stored: bool) -> None:
    modes: list[bool] = []
    watch = Stopwatch(task, DATA, 64, 4, "cpu", 1, contextlib.nullcontext, stored=stored)
    with task.network.bn1.register_forward_hook(lambda norm, *_: modes.append(norm.training)):
        watch.training(32)
    assert modes
    assert set(modes) == {not stored}


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


def test_processes_on_one_processor_share_its_cores(task: ClassificationTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "_an_image", lambda self, step: 0.1)
    monkeypatch.setattr(timing, "all_cores", lambda: 6)
    for devices, readers in ((1, 2), (2, 4), (4, 6)):
        pace = Stopwatch(task, DATA, 64, 4, "cpu", devices, contextlib.nullcontext).usual
        assert (pace.devices, pace.all_readers) == (1, readers)


@pytest.mark.parametrize(
    ("workers", "alone", "together", "waits"), [(0, 1, 2, True), (1, 1, 2, False), (3, 3, 6, False), (16, 8, 8, False)]
)
def test_as_many_read_as_are_set_and_cores_allow(
    task: ClassificationTask, monkeypatch: pytest.MonkeyPatch, workers: int, alone: int, together: int, waits: bool
) -> None:
    monkeypatch.setattr(Stopwatch, "_an_image", lambda self, step: 0.1)
    monkeypatch.setattr(timing, "all_cores", lambda: 8)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # the device that stands for a GPU knows none
    data: Any = SimpleNamespace(workers=lambda processes: workers)
    pace = Stopwatch(task, data, 64, 4, "meta", 2, contextlib.nullcontext).usual
    assert (pace.readers, pace.all_readers) == (alone, together)
    assert pace.shares_cores == waits


@pytest.mark.parametrize(("precision", "looks"), [("32-true", 1), ("bf16-mixed", 2)])
def test_looking_is_measured_in_each_precision(
    task: ClassificationTask, monkeypatch: pytest.MonkeyPatch, precision: str, looks: int
) -> None:
    measured: list[object] = []
    monkeypatch.setattr(Stopwatch, "_an_image", lambda self, step: float(len(measured.append(step) or measured)))
    watch = Stopwatch(task, DATA, 64, 4, "cpu", 1, partial(computing, precision, "cpu"))
    assert (watch.usual.answering, watch.usual.embedding) == (1, looks)


@pytest.mark.parametrize(("seconds", "timed"), [((0.2, 0.1), 2), ((3.0, 0.1), 1)])
def test_a_step_that_takes_long_is_timed_once(
    task: ClassificationTask, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], timed: int
) -> None:
    watch, left = stopwatch(task), list(seconds)
    monkeypatch.setattr(Stopwatch, "_timed", lambda self, step: left.pop(0))
    assert watch._an_image(lambda: None) == min(seconds[:timed]) / 4
    assert len(left) == 2 - timed
