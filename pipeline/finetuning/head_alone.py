"""What strategies share that solve a head, and train nothing."""

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from pipeline.finetuning.solving import PlainImages, SolvedHead
from pipeline.models.backbones import depth_groups


def judges_training_images(task: Any) -> bool:
    """Whether training images can be judged by solved heads that have not seen them.

    The backbone must not have seen them either, as one that was trained here before may have; and evaluation must look
    at each image once, as heads do.

    Args:
        task: a :class:`~pipeline.task.ClassificationTask`, with the weights that it starts from.
    """
    return not task.lineage.trained_here and task.hparams["test_time_augmentation"] == "none"


class HeadAlone(SolvedHead):
    """The backbone stays as it is: each image passes it once, and no epoch is trained."""

    takes_steps = False

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
            Logits, float32 ``(N, C)``, NaN where an image is not judged: none is where this strategy solved no head, or
            :func:`judges_training_images` says no.
        """
        if self.penalty is None or not judges_training_images(task):
            return torch.full((len(data.plain("train")), len(task.classes)), torch.nan)
        return self._judge(trainer, task, data)

    @abstractmethod
    def _judge(self, trainer: Trainer, task: Any, data: PlainImages) -> Tensor:
        """The same, where a head was solved and images can be judged."""
