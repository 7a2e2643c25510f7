"""A solved head against ten epochs of a head on the same frozen network: seconds and accuracy.

    PIPELINE_MATERIAL=... python benchmarks/probe.py    # about four minutes on two cores; nothing else should run

Images are those of trash, ResNet-18 with the material's weights, float32, one process. A fifth of the images tests. Ten
frozen epochs read, decode and pass each image ten times and take a step of AdamW at 1e-3 for each batch of 32; the
solved head passes each image once, keeps the features, and is fitted with its penalty chosen by cross-validation; the
second time the features are on disk. Seconds begin with the datamodule in place and end with the head.

Accuracy and log loss are compared on ten random divisions, a quarter of the images testing, both heads on the same
features: those of frozen epochs are the same in every epoch.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from datamodules import ImageFolderDataModule
from pipeline.finetuning.features import task_features
from pipeline.finetuning.probe import fit_probe
from pipeline.models.backbones import features
from pipeline.models.modes import evaluating
from pipeline.models.weights import preprocessing_record
from pipeline.task import ClassificationTask

EPOCHS, SEED, DIVISIONS = 10, 0, 10
#: What is asked of the solved head: times as fast, the first time and the second.
FIRST, SECOND = 8, 100


class Contest:
    """Images, network and what both ways need."""

    def __init__(self, material: Path, folder: Path) -> None:
        weights = str(material / "weights/resnet18_imagenet.fp16.safetensors")
        record = {**preprocessing_record("resnet18", weights), "size": 160}
        self.folder = folder
        self.data = ImageFolderDataModule(
            str(material / "data/trashnet/images"), preprocessing=record, batch_size=32, val_fraction=0, seed=SEED
        )
        self.data.prepare_data()
        self.task = ClassificationTask(self.data.classes, self.data.preprocessing.to_dict(), "resnet18", weights)
        self.train, self.test = self.data.plain("train"), self.data.plain("test")
        self.targets = torch.from_numpy(self.train.targets)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the head that is solved."""
        found = task_features(
            self.task,
            partial(self.data.plain_batches, self.train),
            self.data.images("train").contents(self.folder / "contents.npy"),
            self.folder,
        )
        probe = fit_probe(torch.from_numpy(found), self.targets, len(self.task.classes), seed=SEED)
        return probe.weight, probe.bias

    def train_epochs(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the head that is trained on the frozen network."""
        network = self.task.network

        def batches(order: np.ndarray) -> Iterator[Tensor]:
            for images in self.data.plain_batches(self.train, order.tolist()):
                with torch.inference_mode():
                    found = features(network, self.task.normalise(images))
                yield found.clone()

        size: int = network.get_submodule(self.task.head).in_features
        with evaluating(network):
            return train_head(batches, self.targets, size, len(self.task.classes), SEED)

    def everything(self) -> tuple[Tensor, Tensor]:
        """Features and classes of all images."""
        parts, network = [], self.task.network
        with torch.inference_mode(), evaluating(network):
            for images in (self.train, self.test):
                for batch in self.data.plain_batches(images, range(len(images))):
                    parts.append(features(network, self.task.normalise(batch)))
        return torch.cat(parts).clone(), torch.cat([self.targets, torch.from_numpy(self.test.targets)])


def train_head(
    batches: Callable[[np.ndarray], Iterable[Tensor]], targets: Tensor, size: int, classes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Ten epochs of a linear head.

    Args:
        batches: of features, 32 each, of the rows in this order.
        targets: of all rows.
        size: of a row's features.
        classes: their number.
        seed: of the head and of the order.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    head = nn.Linear(size, classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        order = rng.permutation(len(targets))
        for found, rows in zip(batches(order), np.split(order, range(32, len(order), 32)), strict=True):
            loss = nn.functional.cross_entropy(head(found), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.weight.detach(), head.bias.detach()


def compare(found: Tensor, targets: Tensor, classes: int, seed: int) -> tuple[list[float], list[float]]:
    """Accuracy and log loss of the solved head and of the trained one on a quarter of the images."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 4], order[len(order) // 4 :]
    known, truth = found[train], targets[train]
    probe = fit_probe(known, truth, classes, seed=seed)
    heads = [
        (probe.weight, probe.bias),
        train_head(lambda rows: known[rows].split(32), truth, known.shape[1], classes, seed),
    ]
    answers = [found[test] @ weight.T + bias for weight, bias in heads]
    accuracies = [float((answer.argmax(1) == targets[test]).float().mean()) for answer in answers]
    return accuracies, [float(nn.functional.cross_entropy(answer, targets[test])) for answer in answers]


def timed(make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[float, tuple[Tensor, Tensor]]:
    started = time.perf_counter()
    head = make()
    return time.perf_counter() - started, head


def main() -> None:
    material = os.environ.get("PIPELINE_MATERIAL")
    if material is None:
        sys.exit("PIPELINE_MATERIAL: expected the folder with data and weights, found it unset.")
    with tempfile.TemporaryDirectory() as scratch:
        contest = Contest(Path(material).resolve(), Path(scratch))
        warm = torch.zeros(32, 3, 160, 160)
        with torch.inference_mode():
            contest.task.network(warm)
        first, solved = timed(contest.solve)
        second, again = timed(contest.solve)
        assert torch.equal(solved[0], again[0])
        epochs, _ = timed(contest.train_epochs)
        everything = contest.everything()
    compared = np.array([compare(*everything, len(contest.task.classes), seed) for seed in range(DIVISIONS)])
    print(f"{len(contest.train):,} training images, {len(contest.test):,} test images")
    print(f"{EPOCHS} frozen epochs  {epochs:7.2f} s")
    for name, seconds, least in (("solved, first time", first, FIRST), ("solved, second time", second, SECOND)):
        verdict = "met    " if epochs / seconds >= least else "not met"
        print(f"{name:<19}{seconds:7.2f} s   {verdict} {epochs / seconds:.1f} times as fast (at least {least})")
    for number, (name, unit, sign) in enumerate((("accuracy", "points", 100), ("log loss", "nats", 1))):
        solved_ones, trained_ones = compared[:, number].T
        gain = sign * (solved_ones - trained_ones)
        half = stats.t.ppf(0.975, DIVISIONS - 1) * stats.sem(gain)
        digits = 1 if sign > 1 else 3
        print(
            f"{name}: solved {solved_ones.mean():.4f}, trained {trained_ones.mean():.4f}, difference "
            f"{gain.mean():+.{digits}f} ± {half:.{digits}f} {unit} ({DIVISIONS} divisions, paired)"
        )


if __name__ == "__main__":
    main()
