"""The head alone, solved: the baseline that fine-tuning has to beat."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from pipeline.finetuning.solving import PlainImages, SolvedHead, judge_training_images
from pipeline.models.backbones import depth_groups


def judges_in_folds(task: Any) -> bool:
    """Whether training images can be judged by solved heads that have not seen them.

    The backbone must not have seen them either, as one that was trained here before may have; and evaluation must look
    at each image once, as heads do.

    Args:
        task: a :class:`~pipeline.task.ClassificationTask`, with the weights that it starts from.
    """
    return not task.lineage.trained_here and task.hparams["test_time_augmentation"] == "none"


class LinearProbe(SolvedHead):
    """The best linear classifier on a frozen backbone: each image passes the network once, and no epoch is trained.

    The classifier is logistic regression, its penalty chosen by cross-validation (see
    :func:`~pipeline.finetuning.probe.fit_probe`).

    Args:
        features: folder where features are kept; none: below ``~/.cache``.
        turned: solve it on what the images may be turned into (``data.orientation``), too.
    """

    takes_steps = False

    def __init__(self, features: str | None = None, turned: bool = False) -> None:
        super().__init__(features)
        self.turns = turned

    def frozen(self, network: nn.Module) -> list[str]:
        return [name for group in depth_groups(network)[:-1] for name in group]

    def describe(self, network: nn.Module) -> str:
        return f"{type(self).__name__}: the head is solved on features of the frozen backbone, without epochs"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        trainer.should_stop = True

    def judge_out_of_fold(self, trainer: Trainer, task: Any, data: PlainImages) -> Tensor:
        """What heads like this one say of training images that they were solved without.

        Args:
            trainer: whose precision the network computes in.
            task: a :class:`~pipeline.task.ClassificationTask`, whose backbone is as this strategy found it.
            data: with the images that the head was solved on.

        Returns:
            Logits, float32 ``(N, C)``, NaN where an image is not judged (see
            :func:`~pipeline.finetuning.solving.judge_training_images`): none is where this strategy solved no head, or
            :func:`judges_in_folds` says no.
        """
        if self.penalty is None or not judges_in_folds(task):
            return torch.full((len(data.plain("train")), len(task.classes)), torch.nan)
        return judge_training_images(trainer, task, data, self.folder, self.penalty, self._others(data))
