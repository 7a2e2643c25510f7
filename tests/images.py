"""Pictures and datamodules for the tests of the data."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from datamodules import ImageFolderDataModule
from datamodules.dataset import ImageDataset
from datamodules.preprocessing import Preprocessing
from datamodules.storage import FileStorage
from datamodules.table import ImageTable

RECORD: dict[str, Any] = {
    "size": 32,
    "crop": 0.875,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "channels": 3,
    "dtype": "uint8",
}


def smooth(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    """A picture without fine detail, different at every place."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(6 * x / width + phase), np.cos(5 * y / height), np.sin(4 * x / width + 3 * y / height)]
    return np.stack([127 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)


def save(path: Path, phase: float = 0.0, size: tuple[int, int] = (40, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(smooth(*size, phase)).save(path)


def folder_module(root: Path | None, **settings: Any) -> ImageFolderDataModule:
    settings = {"preprocessing": RECORD, "batch_size": 4, "num_workers": 0, **settings}
    return ImageFolderDataModule(root=None if root is None else str(root), **settings)


def attach(module: Any, stage: TrainerFn, world_size: int = 1, rank: int = 0) -> Any:
    """As if a trainer ran the stage with the datamodule."""
    processes = {"world_size": world_size, "num_devices": world_size, "global_rank": rank}
    module.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage), **processes)
    return module


def split_of(table: ImageTable) -> dict[str, str]:
    return dict(zip(table.paths, table.splits, strict=True))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def preprocessing(**changes: Any) -> Preprocessing:
    return Preprocessing.from_dict({**RECORD, **changes})


def epoch_of(module: ImageFolderDataModule, epoch: int) -> list[dict[str, torch.Tensor]]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def numbered(length: int) -> ImageDataset:
    """A dataset of which only the length is asked."""
    storage = FileStorage(Path(), [str(i) for i in range(length)])
    return ImageDataset(storage, range(length), np.zeros(length, np.int64), preprocessing(), None, seed=0)
