"""A solved head first, then everything: linear probing, then fine-tuning."""

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.finetuning.features import task_features
from pipeline.finetuning.probe import Probe, fit_probe
from pipeline.finetuning.strategies import Strategy


class PlainImages(Protocol):
    """What is asked of a datamodule (:class:`~datamodules.base.ImageDataModule` has it)."""

    progress: Any

    def plain(self, split: str) -> Any: ...
    def plain_batches(self, dataset: Any, indices: Sequence[int]) -> Iterator[Tensor]: ...
    def contents(self, split: str, memo: Path) -> list[str]: ...
    def groups(self, split: str) -> list[str] | None: ...


class ProbeThenFineTune(Strategy):
    """The head is solved on features of the network as it was loaded, then everything is trained.

    A head that starts at random distorts the features while it learns; one that already fits them changes them less
    (Kumar et al. 2022, https://arxiv.org/abs/2202.10054). The features are those of the training images as evaluation
    prepares them; they are kept on disk, and a later run with the same images and weights computes none.

    Args:
        features: folder where features are kept; none: below ``~/.cache``.
    """

    needs_weights = True

    def __init__(self, features: str | None = None) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "transfer-pipeline" / "features"
        self.folder = (home if features is None else Path(features)).expanduser()

    def frozen(self, network: nn.Module) -> list[str]:
        return []

    def describe(self, network: nn.Module) -> str:
        total = len(list(network.parameters()))
        return f"{type(self).__name__}: the head is solved on features, then all {total} parameter tensors are trained"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is not None:
            return  # the head of the checkpoint has been trained
        probe = trainer.strategy.broadcast(self._solve(trainer, pl_module) if trainer.is_global_zero else None)
        assert probe is not None
        head = pl_module.network.get_submodule(pl_module.head)  # type: ignore[union-attr,arg-type]
        with torch.no_grad():
            head.weight.copy_(probe.weight)  # type: ignore[operator]
            head.bias.copy_(probe.bias)  # type: ignore[operator]

    def _solve(self, trainer: Trainer, task: Any) -> Probe:
        network: nn.Module = task.network
        if not isinstance(network.get_submodule(task.head), nn.Linear):
            raise UserError(
                f"finetuning: expected a network whose head is linear for ProbeThenFineTune, found "
                f"{type(network.get_submodule(task.head)).__name__} in '{task.hparams['backbone']}'; set finetuning to "
                "FullFineTuning."
            )
        data: PlainImages | None = trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise UserError(
                "finetuning: expected a datamodule for ProbeThenFineTune, which looks at the training images before "
                "it trains, found loaders alone; pass datamodule to Trainer.fit, or set finetuning to FullFineTuning."
            )
        images = data.plain("train")
        found = task_features(
            task,
            partial(data.plain_batches, images),
            data.contents("train", self.folder / "contents.npy"),
            self.folder,
            partial(data.progress, "features"),
            str(trainer.precision),
            trainer.precision_plugin.forward_context,
        )
        probe = fit_probe(
            torch.from_numpy(found),
            torch.from_numpy(images.targets),
            len(task.classes),
            None if images.weights is None else torch.from_numpy(images.weights),
            _together(data.groups("train")),
            seed=task.hparams["seed"],
        )
        return replace(probe, bias=probe.bias + _offsets(task))


def _together(groups: list[str] | None) -> list[Hashable] | None:
    """What is held out together; an image without a group stands alone."""
    return None if groups is None else [group.strip() or number for number, group in enumerate(groups)]


def _offsets(task: Any) -> Tensor:
    """What training towards other shares of the classes adds to their logits, ``(C,)`` or ``(1,)``.

    Classes that weigh ``w`` times as much have ``w`` times the odds.
    """
    objective = task.objective
    offsets: Tensor = objective.class_weights.log() - objective.adjustment
    if task.hparams["imbalance"] == "balanced_sampling" and not task.hparams["multi_label"]:
        offsets = offsets - torch.tensor(task.class_shares, device=offsets.device).log()
    return offsets.cpu()
