"""How long an image takes on this machine, measured."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from datamodules import DataError, ImageDataModule
from datamodules.checking import usable_cores
from pipeline.finetuning.features import evaluating
from pipeline.finetuning.freezing import freeze, hold_still
from pipeline.task import ClassificationTask

_STEPS = 3  # after one that warms up
_READ = 24  # images


@dataclass(frozen=True)
class Pace:
    """Seconds an image takes, at one size.

    Attributes:
        size: side of the network's input in pixels.
        training: forward and backward and a step, in the training's precision.
        evaluation: forward in float32.
        reading: decoding and augmenting, on one core.
        shares_cores: whether the network computes on the cores that read.
        readers: processes that read.
    """

    size: int
    training: float
    evaluation: float
    reading: float
    shares_cores: bool
    readers: int

    def at(self, size: int) -> "Pace":
        """The same for another size: work grows with the area."""
        ratio = (size / self.size) ** 2
        return replace(self, size=size, training=self.training * ratio, evaluation=self.evaluation * ratio)

    @property
    def trained(self) -> float:
        """Seconds for an image that is read and trained on."""
        return self._with_reading(self.training)

    @property
    def evaluated(self) -> float:
        """Seconds for an image that is read and answered."""
        return self._with_reading(self.evaluation)

    def _with_reading(self, computing: float) -> float:
        reading = self.reading / self.readers
        return computing + reading if self.shares_cores else max(computing, reading)


def measure_pace(
    task: ClassificationTask,
    data: ImageDataModule,
    size: int,
    batch_size: int,
    computing: Callable[[], AbstractContextManager[Any]],
    frozen: Collection[str] = (),
) -> Pace:
    """Try a few steps on made-up images, and read a few real ones. Weights and statistics are left as they were.

    Args:
        task: a network of its own, which nobody trains; it comes back in evaluation mode.
        data: whose training images are read.
        size: side of the network's input in pixels.
        batch_size: images a step.
        computing: context of the training's precision.
        frozen: names of parameters that are not trained.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = task.to(device).network
    # Noise, because a processor multiplies zeros at another speed.
    channels = len(task.mean.flatten())
    images = torch.rand(batch_size, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    freeze(network, frozen)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def train() -> None:
        with computing():
            loss = network(images).float().square().mean()
        torch.autograd.grad(loss, parameters)

    def evaluate() -> None:
        with torch.inference_mode():
            network(images)

    network.train()
    hold_still(network)
    training = _seconds(train, device) / batch_size
    with evaluating(network):
        evaluation = _seconds(evaluate, device) / batch_size
    network.load_state_dict(kept)
    cores = usable_cores()
    return Pace(size, training, evaluation, _reading(data), device == "cpu", cores)


def _seconds(step: Callable[[], None], device: str) -> float:
    """The least of a few: what else the machine does only adds."""
    step()
    return min(_timed(step, device) for _ in range(_STEPS))


def _timed(step: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _reading(data: ImageDataModule) -> float:
    images = data.dataset("train")
    count = min(_READ, len(images))
    started = time.perf_counter()
    read = len(list(_readable(images, count)))
    return (time.perf_counter() - started) / max(1, read)


def _readable(images: Any, count: int) -> Iterator[Any]:
    for index in range(count):
        try:
            yield images[(0, index * len(images) // count, 0)]
        except DataError:  # whether that is an error is settled later, with all such images named
            continue
