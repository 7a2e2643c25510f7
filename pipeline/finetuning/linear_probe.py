"""The head alone, solved, linear: the baseline that fine-tuning has to beat."""

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from pipeline.finetuning.head_alone import HeadAlone
from pipeline.finetuning.solving import PlainImages, judge_training_images


class LinearProbe(HeadAlone):
    """The best linear classifier on a frozen backbone: each image passes the network once, and no epoch is trained.

    The classifier is logistic regression, its penalty chosen by cross-validation (see
    :func:`~pipeline.finetuning.probe.fit_probe`).

    Args:
        features: folder where features are kept; none: below ``~/.cache``.
        turned: solve it on what the images may be turned into (``data.orientation``), too.
    """

    def __init__(self, features: str | None = None, turned: bool = False) -> None:
        super().__init__(features)
        self.turns = turned

    def _judge(self, trainer: Trainer, task: Any, data: PlainImages) -> Tensor:
        assert self.penalty is not None
        return judge_training_images(trainer, task, data, self.folder, self.penalty, self._others(data))
