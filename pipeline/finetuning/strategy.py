"""What every strategy shares: a part of the network that is frozen, and proof that it did not move."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from pipeline.errors import UserError
from pipeline.finetuning.freezing import freeze, frozen_digest, frozen_tensors, hold_still

#: Where a checkpoint keeps the names of the parameters that were not trained.
FROZEN = "frozen"
#: Metric of a finished training: how many frozen tensors are, bit by bit, as they were before it.
UNCHANGED = "train/frozen_unchanged"


class Strategy(Callback, ABC):
    """Freezes a part of the network for the whole of the training, and checks that it did not move.

    A subclass names the part in :meth:`frozen`. The task's network is ``pl_module.network``.

    Raises:
        RuntimeError: at the end of the training, where a frozen parameter or buffer is no longer bit-identical.
    """

    #: Whether it makes no sense without pretrained weights.
    needs_weights = False
    #: Whether there is anything to do for an optimizer.
    takes_steps = True
    #: Whether what it hands over is chosen between the start and the end of the training, not among its epochs.
    interpolates = False

    @abstractmethod
    def frozen(self, network: nn.Module) -> list[str]:
        """Names of the parameters that keep their values."""

    def describe(self, network: nn.Module) -> str:
        """In words, for people: what is trained."""
        frozen, total = len(self.frozen(network)), len(list(network.parameters()))
        return f"{type(self).__name__}: {total - frozen} of {total} parameter tensors are trained"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Before the optimizer is made, which takes only what is trained.
        if stage == "fit":
            freeze(pl_module.network, self.frozen(pl_module.network))  # type: ignore[arg-type]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[FROZEN] = self.frozen(pl_module.network)  # type: ignore[arg-type]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        # The optimizer's state is kept by number, and would be another parameter's.
        then, now = checkpoint.get(FROZEN, []), self.frozen(pl_module.network)  # type: ignore[arg-type]
        if then != now:
            raise UserError(
                f"finetuning: expected the strategy that the checkpoint was trained with, in which {len(then)} tensors "
                f"were frozen, found {type(self).__name__}, which freezes {len(now)}; set finetuning as it was, or "
                "start anew from the checkpoint's network with model.weights."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network: nn.Module = pl_module.network  # type: ignore[assignment]
        self.watch(network)
        # A run that goes on in the middle of an epoch does not start that epoch again.
        self.hold(network)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hold(pl_module.network)  # type: ignore[arg-type]

    def hold(self, network: nn.Module) -> None:
        """Keep what is frozen from moving while the rest is trained."""
        hold_still(network)

    def watch(self, network: nn.Module) -> None:
        """Remember what is frozen now, bit by bit."""
        self._watched = frozen_digest(network)

    def verify(self, network: nn.Module) -> int:
        """Compare what is frozen with how it was when it was last watched.

        Returns:
            How many parameters and buffers were compared.

        Raises:
            RuntimeError: one of them is no longer bit-identical.
        """
        count = len(frozen_tensors(network))
        if frozen_digest(network) != self._watched:
            raise RuntimeError(f"{type(self).__name__} froze {count} tensors, and training has changed some of them.")
        return count

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count = self.verify(pl_module.network)  # type: ignore[arg-type]
        for logger in trainer.loggers:
            logger.log_metrics({UNCHANGED: float(count)}, trainer.global_step)
