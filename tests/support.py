"""Small data, and ways to run the command line, for tests."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from safetensors.torch import save_file

from pipeline.models.backbones import create_backbone

COLOURS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


def write_images(folder: Path, per_class: int, seed: int = 0, size: int = 40) -> None:
    """``folder/<class>/<number>.png``: noisy pictures, each class of its own colour."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.clip(np.array(colour) + rng.normal(0, 60, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")


#: Of a run in this process, on one processor, in float32.
MACHINE = ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true"]


def fast(root: Path) -> list[str]:
    """Arguments of a small run of a small network, in float32, without reading processes."""
    return [
        f"--data.root={root}",
        "--model.backbone=resnet20",
        "--data.image_size=32",
        "--data.batch_size=8",
        "--data.val_fraction=0.15",
        *MACHINE,
    ]


def pretrained(folder: Path, per_class: int, backbone: str = "resnet20") -> list[str]:
    """Arguments for a small network with weights, on pictures; both are made in the folder.

    Args:
        folder: for ``weights.safetensors`` and ``images``.
        per_class: pictures of each class.
        backbone: the network.
    """
    torch.manual_seed(1)
    save_file(create_backbone(backbone, 10).state_dict(), folder / "weights.safetensors")
    write_images(folder / "images", per_class)
    return [f"--model.backbone={backbone}", f"--model.weights={folder / 'weights.safetensors'}"]


def runs() -> list[Path]:
    """Run folders below the working folder, the newest last."""
    return sorted(Path("runs").iterdir(), key=lambda folder: folder.stat().st_mtime)


def settings_of(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """What a plan chose, by setting."""
    return {choice["setting"]: choice["value"] for choice in choices}


class InterruptAt(Callback):
    """Sends this process a signal at the start of a training step.

    Args:
        step: the optimizer step at which it comes.
        number: of the signal; by default that of Ctrl-C.
        rank: of the one process that gets it; None: all do.
    """

    def __init__(self, step: int, number: int = int(signal.SIGINT), rank: int | None = None) -> None:
        self.step = step
        self.number = number
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.number)


class FailAt(Callback):
    """Raises what nobody expects at the start of a training step.

    Args:
        step: the optimizer step at which it comes.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError
