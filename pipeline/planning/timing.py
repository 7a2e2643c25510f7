"""How long an image takes on this machine, measured."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from datamodules import DataError, ImageDataModule
from datamodules.checking import all_cores, usable_cores
from pipeline.finetuning.freezing import freeze, hold_still
from pipeline.finetuning.statistics import use_stored_statistics
from pipeline.models.modes import evaluating
from pipeline.task import ClassificationTask

# After a step that warms up: so many, or fewer where they have taken so many seconds.
_STEPS, _ENOUGH = 2, 1.0
_READ = 24  # images


@dataclass(frozen=True)
class Pace:
    """Seconds an image takes to be read and answered, at one size.

    Attributes:
        size: side of the network's input in pixels.
        embedding: forward in the training's precision.
        answering: forward in float32.
        reading: decoding and augmenting, on one core.
        shares_cores: whether the network computes on the cores that read, or in the process that does.
        readers: cores that read for one process alone.
        devices: that compute at once where all train; 1 where they are processes that share the cores.
        all_readers: cores that read for all of them.
        threads: that try whether images can be read.
    """

    size: int
    embedding: float
    answering: float
    reading: float
    shares_cores: bool
    readers: int
    devices: int
    all_readers: int
    threads: int

    def at(self, size: int) -> "Pace":
        """The same for another size, as far as work grows with the area."""
        ratio = (size / self.size) ** 2
        return replace(self, size=size, embedding=self.embedding * ratio, answering=self.answering * ratio)

    def with_reading(self, computing: float) -> float:
        """Seconds for an image that is read, and computed on for so long, by one process alone."""
        return self._together(computing, self.reading / self.readers)

    def on_all_devices(self, computing: float) -> float:
        """The same where all that train share the images."""
        return self._together(computing / self.devices, self.reading / self.all_readers)

    def _together(self, computing: float, reading: float) -> float:
        return computing + reading if self.shares_cores else max(computing, reading)


class Stopwatch:
    """How long an image takes on this machine, measured on a few steps, those of training when that is first asked.

    Steps go through made-up images; real ones are only read. Weights and statistics are left as they were.

    Args:
        task: a network of its own, which nobody trains; it comes back in evaluation mode.
        data: whose training images are read.
        size: side of the network's input in pixels; of larger ones no training is measured, because there the work
            grows with the area.
        batch_size: images a step.
        device: that computes here, as torch names it: ``cpu``, ``cuda:0`` ...
        devices: of its kind that train together.
        computing: context of the training's precision.
        frozen: names of parameters that are not trained.
        stored: whether training normalises by stored statistics, which takes less time than measuring each batch.
    """

    def __init__(
        self,
        task: ClassificationTask,
        data: ImageDataModule,
        size: int,
        batch_size: int,
        device: str,
        devices: int,
        computing: Callable[[], AbstractContextManager[Any]],
        frozen: Collection[str] = (),
        stored: bool = False,
    ) -> None:
        self._device, self._stored = torch.device(device), stored
        self._network = task.to(self._device).network
        self._channels, self._batch_size, self._computing = len(task.mean.flatten()), batch_size, computing
        freeze(self._network, frozen)
        images = self._images(size)
        with evaluating(self._network), torch.inference_mode():
            answering = self._an_image(lambda: self._network(images))
            with computing():
                same = not torch.is_autocast_enabled(self._device.type)
                embedding = answering if same else self._an_image(lambda: self._network(images))
        on_cores = self._device.type == "cpu"
        #: At the size that was given.
        self.usual = Pace(
            size,
            embedding,
            answering,
            _reading(data),
            shares_cores=on_cores or data.workers(1) == 0,
            readers=_readers(data, 1),
            devices=1 if on_cores else devices,
            all_readers=_readers(data, devices),
            threads=usable_cores(),
        )
        self._measured: dict[int, float] = {}

    def training(self, size: int) -> float:
        """Seconds an image takes forward, backward and in a step, at a size, in the training's precision."""
        if size > self.usual.size:
            return self.training(self.usual.size) * (size / self.usual.size) ** 2
        # Smaller ones gain less than their area: some steps take as long for a small image as for a larger one.
        if size not in self._measured:
            self._measured[size] = self._training(self._images(size))
        return self._measured[size]

    def _images(self, size: int) -> Tensor:
        # Noise, because a processor multiplies zeros at another speed.
        images = torch.rand(self._batch_size, self._channels, size, size, device=self._device)
        return images.contiguous(memory_format=torch.channels_last)

    def _training(self, images: Tensor) -> float:
        network = self._network
        kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        # The rate of an optimizer makes no difference to how long it takes.
        optimizer = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad], lr=0.0)

        def train() -> None:
            optimizer.zero_grad()
            with self._computing():
                loss = network(images).float().square().mean()
            loss.backward()
            optimizer.step()

        network.train()
        hold_still(network)
        if self._stored:
            use_stored_statistics(network)
        seconds = self._an_image(train)
        network.eval()
        optimizer.zero_grad()
        network.load_state_dict(kept)
        return seconds

    def _an_image(self, step: Callable[[], object]) -> float:
        """The least of a few, because what else the machine does only adds; one that takes long evens that out."""
        step()
        seconds = [self._timed(step)]
        while len(seconds) < _STEPS and sum(seconds) < _ENOUGH:
            seconds.append(self._timed(step))
        return min(seconds) / self._batch_size

    def _timed(self, step: Callable[[], object]) -> float:
        started = time.perf_counter()
        step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started


def _readers(data: ImageDataModule, processes: int) -> int:
    """Cores that read for so many processes; without reading processes each reads itself."""
    return min(all_cores(), processes * max(1, data.workers(processes)))


def _reading(data: ImageDataModule) -> float:
    images, places = data.dataset("train"), data.images("train").some(_READ)
    # Where there are chunks, these two are of those that all are of, which are fetched now.
    list(_readable(images, places[[0, -1]].tolist()))
    started = time.perf_counter()
    read = len(list(_readable(images, places.tolist())))
    return (time.perf_counter() - started) / max(1, read)


def _readable(images: Any, places: Sequence[int]) -> Iterator[Any]:
    for place in places:
        try:
            yield images[(0, place, 0)]
        except DataError:  # whether that is an error is settled later, with all such images named
            continue
