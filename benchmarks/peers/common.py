"""What the peers share: the command line, reading images, the weights, and the file of probabilities.

A peer is a script that trains on every image of one table and answers for those of another, as its own documentation
shows and with its own defaults. None imports anything of this project, so that none can gain or lose by it:

    python benchmarks/peers/<peer>.py --images train.csv --test test.csv --backbone resnet18 \
        --weights resnet18.safetensors --epochs 20 --size 160 --seed 0 --output probabilities.csv

Tables have the columns ``path`` and ``label``; the output has ``path`` and ``p_<class>`` for each class.
"""

import argparse
import csv
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.models import ResNet, get_model

BATCH, WORKERS = 32, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Share of the resized short side that evaluation keeps: 224 of 256, as everywhere.
CROP = 0.875

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Job:
    """What a peer is asked to do; images are pairs of path and label."""

    train: list[tuple[str, str]]
    test: list[tuple[str, str]]
    backbone: str
    weights: Path
    epochs: int
    size: int
    seed: int
    output: Path

    @property
    def classes(self) -> list[str]:
        return sorted({label for _, label in self.train})

    def write(self, probabilities: ArrayLike) -> None:
        """Write the probabilities of the test images, ``(N, C)`` in their order and that of the classes."""
        with self.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", *(f"p_{name}" for name in self.classes)])
            for (path, _), row in zip(self.test, np.asarray(probabilities), strict=True):
                writer.writerow([path, *(f"{probability:.8f}" for probability in row)])


def read_job(description: str | None) -> Job:
    """From the command line; the generators of random numbers are seeded."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="CSV of the training images")
    parser.add_argument("--test", type=Path, required=True, help="CSV of the test images")
    parser.add_argument("--backbone", required=True, help="a ResNet, as torchvision names it")
    parser.add_argument("--weights", type=Path, required=True, help="its safetensors file")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="pixels a side")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="CSV for the probabilities of the test images")
    given = parser.parse_args()
    random.seed(given.seed)
    np.random.seed(given.seed)
    torch.manual_seed(given.seed)
    train, test = read_table(given.images), read_table(given.test)
    return Job(train, test, given.backbone, given.weights, given.epochs, given.size, given.seed, given.output)


def read_table(file: Path) -> list[tuple[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return [(row["path"], row["label"]) for row in csv.DictReader(lines)]


def pretrained(job: Job) -> ResNet:
    """torchvision's ResNet with the weights of the file and a new head (as its own ``fc`` starts)."""
    network = get_model(job.backbone, weights=None)
    assert isinstance(network, ResNet)
    network.load_state_dict(load_file(job.weights))
    network.fc = nn.Linear(network.fc.in_features, len(job.classes))
    return network


class Images(Dataset[Any]):
    """Pairs of image and class index."""

    def __init__(self, images: Sequence[tuple[str, str]], classes: Sequence[str], transform: Transform) -> None:
        self.paths = [path for path, _ in images]
        self.targets = [classes.index(label) for _, label in images]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.targets[index]


def standard_training(size: int) -> Transform:
    """What the documentation of most shows: a random part of the image, mirrored half of the time."""
    return T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])


def standard_evaluation(size: int) -> Transform:
    """The centre of the resized image."""
    return T.Compose([T.Resize(round(size / CROP)), T.CenterCrop(size), T.ToTensor(), T.Normalize(MEAN, STD)])


def train_epoch(
    network: nn.Module,
    loader: Iterable[Any],
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """One pass over the training images."""
    network.train()
    for images, targets in loader:
        optimizer.zero_grad()
        loss(network(images), targets).backward()
        optimizer.step()
        after_step()


@torch.inference_mode()
def outputs(network: nn.Module, images: Dataset[Any]) -> Tensor:
    """What the network says of each image, in order, in evaluation mode."""
    network.eval()
    loader = DataLoader(images, BATCH, num_workers=WORKERS)
    return torch.cat([network(batch) for batch, _ in loader])


def write_answers(job: Job, network: nn.Module) -> None:
    """Write the probabilities of the test images under the standard evaluation."""
    logits = outputs(network, Images(job.test, job.classes, standard_evaluation(job.size)))
    job.write(logits.double().softmax(dim=1))
