"""A solved head against ten epochs of a head on the same frozen network: seconds and accuracy.

    PIPELINE_MATERIAL=... python benchmarks/probe.py    # about three minutes on two cores; nothing else should run

Images are those of trash, ResNet-18 with the material's weights, float32, one process. A fifth of the images tests. Ten
frozen epochs read, decode and pass each image ten times and take a step of AdamW at 1e-3 for each batch of 32; the
solved head passes each image once, keeps the features, and is fitted with its penalty chosen by cross-validation; the
second time the features are on disk. Seconds begin with the datamodule in place and end with the head.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from datamodules import ImageFolderDataModule
from pipeline.finetuning.features import evaluating, task_features
from pipeline.finetuning.probe import fit_probe
from pipeline.models.backbones import features
from pipeline.models.weights import preprocessing_record
from pipeline.task import ClassificationTask

EPOCHS, SEED = 10, 0
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
            self.data.contents("train", self.folder / "contents.npy"),
            self.folder,
        )
        probe = fit_probe(torch.from_numpy(found), self.targets, len(self.task.classes), seed=SEED)
        return probe.weight, probe.bias

    def train_epochs(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the head that is trained on the frozen network."""
        torch.manual_seed(SEED)
        rng, network = np.random.default_rng(SEED), self.task.network
        head = nn.Linear(network.get_submodule(self.task.head).in_features, len(self.task.classes))
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
        with evaluating(network):
            for _ in range(EPOCHS):
                order = rng.permutation(len(self.train))
                batches = self.data.plain_batches(self.train, order.tolist())
                for images, rows in zip(batches, np.split(order, range(32, len(order), 32)), strict=True):
                    with torch.inference_mode():
                        found = features(network, self.task.normalise(images))
                    loss = nn.functional.cross_entropy(head(found.clone()), self.targets[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return head.weight.detach(), head.bias.detach()

    def right(self, head: tuple[Tensor, Tensor]) -> np.ndarray:
        """Whether each test image is recognised."""
        weight, bias = head
        with torch.inference_mode(), evaluating(self.task.network):
            batches = self.data.plain_batches(self.test, range(len(self.test)))
            answers = [features(self.task.network, self.task.normalise(images)) @ weight.T + bias for images in batches]
        return torch.cat(answers).argmax(1).numpy() == self.test.targets


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
        epochs, trained = timed(contest.train_epochs)
        gain = contest.right(solved).astype(float) - contest.right(trained)
        accuracy = contest.right(solved).mean()
    rng = np.random.default_rng(SEED)
    draws = [gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(2000)]
    low, high = np.percentile(draws, (2.5, 97.5))
    print(f"{len(contest.train):,} training images, {len(contest.test):,} test images")
    print(f"{EPOCHS} frozen epochs  {epochs:7.2f} s")
    for name, seconds, least in (("solved, first time", first, FIRST), ("solved, second time", second, SECOND)):
        verdict = "met    " if epochs / seconds >= least else "not met"
        print(f"{name:<19}{seconds:7.2f} s   {verdict} {epochs / seconds:.1f} times as fast (at least {least})")
    difference = f"{100 * gain.mean():+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    print(f"accuracy of the solved head {accuracy:.4f}, {difference}")


if __name__ == "__main__":
    main()
