"""What becomes of a trained network before it is tested: one checkpoint, the best that this run can hand over."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from datamodules import ImageDataModule
from pipeline.checkpoints import INTERPOLATED, interpolate_checkpoint, read_checkpoint
from pipeline.evaluation.predictions import Predictions, to_probabilities
from pipeline.finetuning.features import evaluating
from pipeline.finetuning.interpolation import USUAL_SHARE, StartingPoint, between, choose_share
from pipeline.precision import computing
from pipeline.runs import BEST, LAST
from pipeline.task import ClassificationTask

_ASKED = 256  # validation images; more of them choose no better


def interpolated_checkpoint(
    trainer: Trainer,
    task: ClassificationTask,
    data: ImageDataModule,
    folder: Path,
    start: StartingPoint,
    validates: bool,
) -> tuple[Path, float]:
    """Make the best checkpoint of what lies between the first and the last network, once.

    Args:
        trainer: done with the training.
        task: that was trained.
        data: whose validation images are asked.
        folder: of the run, with its last checkpoint.
        start: where training began.
        validates: whether there are validation images; without them, the usual share of the way is gone.

    Returns:
        The checkpoint, and how much of the way was gone.
    """
    best = folder.resolve() / BEST
    # By this run, before it was interrupted.
    done = read_checkpoint(best).get(INTERPOLATED) if best.is_file() else None
    # Asked by all processes before the first one writes.
    trainer.strategy.barrier()
    if done is None and trainer.is_global_zero:
        last, prefix = read_checkpoint(folder / LAST)["state_dict"], "network."
        end = {name.removeprefix(prefix): tensor for name, tensor in last.items() if name.startswith(prefix)}
        first = start.read()
        task.to(trainer.strategy.root_device)  # which the trainer took it from when training was over
        share = USUAL_SHARE
        if validates:
            share = choose_share(first, end, _Validation(task, data, str(trainer.precision)))
        interpolate_checkpoint(
            folder / LAST, best, {f"{prefix}{n}": t for n, t in between(first, end, share).items()}, share
        )
    trainer.strategy.barrier()
    return best, read_checkpoint(best)[INTERPOLATED]


class _Validation:
    """Answers of any state of a task's network to some validation images, which are read once."""

    def __init__(self, task: ClassificationTask, data: ImageDataModule, precision: str) -> None:
        images = data.plain("val")
        chosen = np.sort(np.random.default_rng(task.hparams["seed"]).permutation(len(images))[:_ASKED])
        self.task = task
        self.precision = precision
        self.targets = images.targets[chosen].astype(np.int64)
        self.batches = list(data.plain_batches(images, chosen.tolist()))

    def __call__(self, state: dict[str, torch.Tensor]) -> Predictions:
        task = self.task
        task.network.load_state_dict(state)
        parts: list[Any] = []
        with evaluating(task.network), torch.inference_mode(), computing(self.precision, task.device.type):
            for images in self.batches:
                logits = task(images.to(task.device)).double()
                parts.append(to_probabilities(logits, task.hparams["multi_label"]).cpu())
        return Predictions(self.targets, torch.cat(parts).numpy(), task.hparams["multi_label"])
