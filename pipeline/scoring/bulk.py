"""Predictions of any number of images, part by part: what is in memory does not grow with their number."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer

from datamodules import ImageDataModule
from datamodules.dataset import ImageDataset, ImageLoader, Item
from datamodules.errors import DataError
from datamodules.sampling import EpochSampler, SampleKey
from datamodules.storage import FileStorage
from datamodules.unlabelled import UnlabelledImages
from pipeline.evaluation.predictions import PredictionCollector
from pipeline.progress import Meter, say
from pipeline.scoring.parts import Part, PartFolder
from pipeline.task import ClassificationTask

#: Images of a part: what is in memory at once, and the most that a kill costs.
IMAGES_A_PART = 10_000
_UNREADABLE = -2


class _Tolerant(ImageDataset):
    """Gives a black image in place of one that cannot be read, with a target of its own."""

    def __getitem__(self, key: SampleKey) -> Item:
        try:
            return super().__getitem__(key)
        except DataError:
            record = self.preprocessing
            black = torch.zeros(record.size, record.size, record.channels, dtype=getattr(torch, record.dtype))
            return {"image": black.permute(2, 0, 1), "index": key[1], "target": _UNREADABLE}

    def error(self, index: int) -> str:
        """Why an image cannot be read."""
        try:
            self.open(index).pixels()
        except OSError as error:
            return " ".join(str(error).split())
        return "it could not be read a moment ago"


class _PartData(LightningDataModule):
    """The images of one part, for the trainer."""

    def __init__(self, dataset: ImageDataset, data: ImageDataModule) -> None:
        super().__init__()
        self.dataset = dataset
        self.data = data

    def predict_dataloader(self) -> ImageLoader:
        assert self.trainer is not None
        replicas, rank = self.trainer.world_size, self.trainer.global_rank
        return ImageLoader(
            self.dataset,
            batch_size=self.data.batch_size,
            sampler=EpochSampler(self.dataset, replicas, rank, training=False, seed=0),
            num_workers=self.data.workers(self.trainer.num_devices),
            pin_memory=torch.cuda.is_available(),
        )


@dataclass
class BulkScoring:
    """Scores images into a folder of Parquet files; begun again, it goes on behind the last whole one.

    Attributes:
        trainer: with the collector among its callbacks.
        task: the model; the checkpoint's weights are loaded into it.
        data: whose ``predict_path`` is scored.
        checkpoint: of the model.
        collector: of predictions.
        meter: for the progress.
    """

    trainer: Trainer
    task: ClassificationTask
    data: ImageDataModule
    checkpoint: Path
    collector: PredictionCollector
    meter: Meter
    _loaded: bool = field(default=False, init=False)

    def run(self, folder: Path) -> None:
        """Do it.

        Args:
            folder: for the parts.

        Raises:
            UserError: the folder holds something else, or the images are no longer those that it was begun with.
            DataError: there are no images.
        """
        images = self.data.unlabelled
        total = sum(1 for _ in images)
        parts = PartFolder(folder, self._about())
        # Looked up before any process writes one.
        there = {part.number for part in _cut(images) if parts.has(part)}
        done = unreadable = scored = 0
        started = time.perf_counter()
        for part in _cut(images):
            if part.number not in there:
                unreadable += self._score(part, parts)
                scored += len(part.paths)
            done += len(part.paths)
            self.meter("scoring", done, total)
            if part.number not in there and not self.meter.shown and done < total:
                rate = scored / (time.perf_counter() - started)
                say(f"{done:,} of {total:,} images, {rate:.0f} a second")
        before = f", {done - scored:,} of them before" if scored < done else ""
        say(f"{done:,} predictions in {folder}{before}")
        if unreadable:
            say(f"{unreadable:,} of these images cannot be read; the column error says why")

    def _score(self, part: Part, parts: PartFolder) -> int:
        """Score a part and keep it; the number of images in it that cannot be read."""
        # Every process needs an image; what is there twice for that is not kept.
        paths = [*part.paths, *[part.paths[-1]] * max(0, self.trainer.world_size - len(part.paths))]
        rows = np.arange(len(paths))
        storage = FileStorage(self.data.unlabelled.root, paths)
        dataset = _Tolerant(storage, rows, np.full(len(rows), -1), self.data.preprocessing, None, 0)
        self.trainer.predict(
            self.task,
            datamodule=_PartData(dataset, self.data),
            ckpt_path=None if self._loaded else self.checkpoint,
            weights_only=True,
            return_predictions=False,
        )
        self._loaded = True
        predictions = self.collector.collected
        assert predictions is not None
        kept = predictions.first(len(part.paths))
        errors = {int(place): dataset.error(int(place)) for place in np.flatnonzero(kept.targets == _UNREADABLE)}
        if self.trainer.is_global_zero:
            parts.write(part, kept, errors, self.task.classes)
        return len(errors)

    def _about(self) -> dict[str, Any]:
        with self.checkpoint.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "checkpoint": digest,
            "images": str(self.data.unlabelled.source),
            "test_time_augmentation": self.task.hparams["test_time_augmentation"],
            "images_a_part": IMAGES_A_PART,
        }


def _cut(images: UnlabelledImages) -> Iterator[Part]:
    paths, number = iter(images), 0
    while some := list(islice(paths, IMAGES_A_PART)):
        yield Part(number, images.root, some)
        number += 1
