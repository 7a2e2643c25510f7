"""What choices are made from."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from datamodules import ImageDataModule
from pipeline.finetuning.optimization import weight_scale
from pipeline.finetuning.statistics import normalises_depthwise
from pipeline.models.backbones import LAST_STAGES, TIMM, described_by_head, has_linear_head, most_head_stages
from pipeline.task import ClassificationTask

_LOOKED_AT = 32  # images whose size is read


@dataclass(frozen=True)
class Facts:
    """What is known before training.

    Attributes:
        images: that train.
        validated: that validate.
        draws_val: whether those are drawn from the images that would train.
        tested: that test.
        classes: their number.
        fewest: training images of the rarest class.
        most: training images of the most frequent class.
        multi_label: whether an image may have several classes.
        short_side: median short side of the images, in pixels.
        weights_size: side in pixels of what the weights were trained with.
        fixed_size: whether the network takes no other.
        pretrained: whether there are weights to build on.
        linear_head: whether the classifier is one linear layer, and can be solved.
        head_stages: how many of the last stages a classifier can see.
        described_by_head: whether a classifier that sees all of them sees just what tells strange images.
        trained_here: whether the weights may have learned these very images.
        depthwise: whether the network has both depthwise convolutions and batch normalisations.
        step_scale: root mean square of the backbone's weights, the median over its layers.
        device: ``cpu``, ``cuda`` or another kind.
        devices: that train together.
        first_device: the one of them on which a plan is tried, as torch names it.
        accumulated: batches of each device that make a step.
    """

    images: int
    validated: int
    draws_val: bool
    tested: int
    classes: int
    fewest: int
    most: int
    multi_label: bool
    short_side: int
    weights_size: int
    fixed_size: bool
    pretrained: bool
    linear_head: bool
    head_stages: int
    described_by_head: bool
    trained_here: bool
    depthwise: bool
    step_scale: float
    device: str
    devices: int
    first_device: str
    accumulated: int

    @property
    def taught(self) -> int:
        """Images that would train if none were held out of them."""
        return self.images + (self.validated if self.draws_val else 0)

    @property
    def batches(self) -> int:
        """That a step is made of, on all devices together."""
        return self.devices * self.accumulated


def gather_facts(data: ImageDataModule, task: ClassificationTask, weights_size: int, trainer: Any) -> Facts:
    """Look at the data and the network; a few images are opened.

    Args:
        data: in no stage yet.
        task: with its weights loaded.
        weights_size: what the weights' own record says.
        trainer: its settings.
    """
    device = "cuda" if trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    table, network = data.table, task.network
    counts = table.counts("train")
    of_classes = [counts[name] for name in data.classes]
    channels = len(task.hparams["preprocessing"]["mean"])
    return Facts(
        images=len(table.rows("train")),
        validated=len(table.rows("val")),
        draws_val=data.division.draws_val(table.listing),
        tested=len(table.rows("test")),
        classes=len(data.classes),
        fewest=min(of_classes),
        most=max(of_classes),
        multi_label=data.multi_label,
        short_side=_short_side(data),
        weights_size=weights_size,
        fixed_size=_takes_one_size(task),
        pretrained=task.load_report is not None,
        linear_head=has_linear_head(network, channels),
        head_stages=most_head_stages(network, channels),
        described_by_head=described_by_head(task.hparams["backbone"], LAST_STAGES),
        trained_here=task.lineage.trained_here,
        depthwise=normalises_depthwise(network),
        step_scale=weight_scale(network, task.head),
        device=device,
        devices=count_devices(trainer.devices, device) * int(trainer.num_nodes),
        first_device=first_device(trainer.devices, device),
        accumulated=trainer.accumulate_grad_batches,
    )


def count_devices(given: Any, device: str) -> int:
    """Devices that a trainer's setting means, on one machine.

    Args:
        given: ``trainer.devices``.
        device: their kind.
    """
    if named := named_devices(given):
        return len(named)
    if str(given) in ("auto", "-1"):
        return torch.cuda.device_count() if device == "cuda" else 1
    return int(given)


def first_device(given: Any, device: str) -> str:
    """The device, as torch names it, that a trainer's setting means first.

    Args:
        given: ``trainer.devices``.
        device: their kind.
    """
    if device == "cpu":
        return device
    named = named_devices(given)
    # One that is not there is refused where the trainer is made.
    return f"{device}:{named[0] if named and named[0] < torch.cuda.device_count() else 0}"


def named_devices(given: Any) -> list[int]:
    """Numbers of the devices that a trainer's setting names; none where it counts them.

    Args:
        given: ``trainer.devices``.
    """
    if isinstance(given, list):
        return given
    # "0," names one device, as Lightning reads it, and "2" counts two.
    return [int(number) for number in given.split(",") if number] if isinstance(given, str) and "," in given else []


def _takes_one_size(task: ClassificationTask) -> bool:
    # Our own networks average over whatever comes; timm says which of its own do not.
    if not task.hparams["backbone"].startswith(TIMM):
        return False
    return bool(task.network.pretrained_cfg.get("fixed_input_size", False))  # type: ignore[union-attr,operator]


def _short_side(data: ImageDataModule) -> int:
    images = data.plain("train")
    sides = []
    for index in data.images("train").some(_LOOKED_AT):
        try:
            picture = images.open(int(index))
        except OSError:  # whether that is an error is settled later, with all such images named
            continue
        sides.append(min(picture.height, picture.width))
    return int(statistics.median(sides)) if sides else data.preprocessing.size
