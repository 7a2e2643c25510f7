"""Small data, and ways to run the command line, for tests."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


def write_images(folder: Path, per_class: int, seed: int = 0, size: int = 40) -> None:
    """``folder/<class>/<number>.png``: noisy pictures, each class of its own colour."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.clip(np.array(colour) + rng.normal(0, 60, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")


def fast(root: Path) -> list[str]:
    """Arguments of a small run in float32 without reading processes."""
    return [
        f"--data.root={root}",
        "--data.image_size=32",
        "--data.batch_size=8",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.precision=32-true",
    ]


class InterruptAt(Callback):
    """Sends this process a Ctrl-C at the start of a training step.

    Args:
        step: the optimizer step at which it comes.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
