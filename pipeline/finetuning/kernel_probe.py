"""The head alone, solved, curved: nearly what fine-tuning finds, for one look at each image."""

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from pipeline.errors import UserError
from pipeline.finetuning.head_alone import HeadAlone
from pipeline.finetuning.solving import PlainImages, solve_kernel_head


class KernelProbe(HeadAlone):
    """A classifier by distances on a frozen backbone: each image passes the network once, and no epoch is trained.

    The classifier is kernel ridge regression, its width and penalty chosen by images that are left out one by one (see
    :func:`~pipeline.finetuning.kernel_ridge.fit_kernel_ridge`); the network's classifier becomes a
    :class:`~pipeline.models.kernel_head.KernelHead`.

    Args:
        features: folder where features are kept; none: below ``~/.cache``.

    Raises:
        UserError: images may have several classes.
    """

    def __init__(self, features: str | None = None) -> None:
        super().__init__(features)
        self._left_out: Tensor | None = None

    def _solve(self, trainer: Trainer, task: Any, data: PlainImages) -> dict[str, Tensor]:
        if task.hparams["multi_label"]:
            raise UserError(
                "finetuning: expected images of one class each for KernelProbe, found images that may have several; "
                "set finetuning to LinearProbe."
            )
        head = solve_kernel_head(trainer, task, data, self.folder)
        self.penalty, self._left_out = head.penalty, head.left_out
        return head.state()

    def _judge(self, trainer: Trainer, task: Any, data: PlainImages) -> Tensor:
        assert self._left_out is not None
        return self._left_out
