"""The head alone, solved: the baseline that fine-tuning has to beat."""

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from pipeline.finetuning.solving import SolvedHead
from pipeline.models.backbones import depth_groups


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
