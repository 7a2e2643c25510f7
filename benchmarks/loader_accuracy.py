"""Is a model as accurate when its training images are decoded at a reduced scale, or read from the cache?

Called by ``python benchmarks/loader.py --accuracy``. ResNet-18 with the ImageNet weights of the material is fine-tuned
on the trash photographs at 64 px, where two thirds of the crops are decoded at half scale; five seeds, one split.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything

from datamodules import ImageFolderDataModule
from datamodules.dataset import ImageDataset
from datamodules.preprocessing import Picture
from pipeline.models.weights import preprocessing_record
from pipeline.task import ClassificationTask

SEEDS, EPOCHS, SIZE = 5, 5, 64


class WholePicture:
    """A picture that is always decoded in full: what reduced decoding is compared with."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self.height, self.width = picture.height, picture.width

    def pixels(self, share: float = 1.0) -> np.ndarray:
        return self._picture.pixels()


class WholeDataset(ImageDataset):
    """Images that are always decoded in full."""

    def open_row(self, row: int) -> Any:
        return WholePicture(super().open_row(row))


class WholeImages(ImageFolderDataModule):
    """The same data, always decoded in full."""

    def dataset(self, split: str) -> ImageDataset:
        made = super().dataset(split)
        if split == "train":
            made.__class__ = WholeDataset
        return made


def compare(images: Path, scratch: Path) -> dict[str, Any]:
    """Test accuracy by arm and seed."""
    torch.set_num_threads(2)
    weights = str(images.parents[2] / "weights" / "resnet18_imagenet.fp16.safetensors")
    arms: dict[str, tuple[type[ImageFolderDataModule], str | None]] = {
        "decoded in full": (WholeImages, None),
        "decoded at reduced scale": (ImageFolderDataModule, None),
        "from the cache": (ImageFolderDataModule, str(scratch / "cache")),
    }
    result: dict[str, Any] = {
        name: [train(*arm, images, weights, seed) for seed in range(SEEDS)] for name, arm in arms.items()
    }
    full = np.array(result["decoded in full"])
    for name, accuracies in result.items():
        difference = np.array(accuracies) - full
        half = 2.776 * difference.std(ddof=1) / np.sqrt(SEEDS)  # Student's t, 4 degrees of freedom
        print(
            f"{name:<26} test accuracy {np.mean(accuracies):.4f} [{min(accuracies):.4f}, {max(accuracies):.4f}], "
            f"paired difference {difference.mean():+.4f} +- {half:.4f} (95 %, {SEEDS} seeds)"
        )
    return result


def train(kind: type[ImageFolderDataModule], cache: str | None, images: Path, weights: str, seed: int) -> float:
    """Test accuracy of one run."""
    seed_everything(seed, verbose=False)
    data = kind(
        str(images),
        image_size=SIZE,
        train_transforms="standard",
        num_workers=0,
        seed=seed,
        cache=cache,
        preprocessing=preprocessing_record("resnet18", weights),
    )
    task = ClassificationTask(data.classes, data.preprocessing.to_dict(), "resnet18", weights)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, **quiet)
    trainer.fit(task, data)
    hits = []
    task.eval()
    with torch.inference_mode():
        for batch in data.test_dataloader():
            hits.append(task.answer(batch["image"]).probabilities.argmax(dim=1) == batch["target"])
    return float(torch.cat(hits).float().mean())
