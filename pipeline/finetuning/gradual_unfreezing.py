"""From the head downwards: the layers nearest to the classifier are trained first, the others join in later."""

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UserError
from pipeline.finetuning.statistics import use_stored_statistics
from pipeline.finetuning.strategy import Strategy
from pipeline.models.backbones import depth_groups


class GradualUnfreezing(Strategy):
    """The head is trained first; stage by stage, from the last to the stem, the backbone joins in.

    What has not joined in yet is frozen: no gradients, and stored statistics (Howard and Ruder 2018, section 3.3,
    https://arxiv.org/abs/1801.06146). Which stages are trained depends on the epoch alone, so that a run that goes on
    goes on with the same ones.

    Args:
        share: of the epochs, in which the stages join in, evenly; afterwards all of them are trained. In (0, 1].

    Raises:
        UserError: the share is out of range, or several processes train together that do not expect parameters without
            a gradient.
    """

    needs_weights = True

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise UserError(f"finetuning.share: expected a share of the epochs in (0, 1], found {share}.")
        self.share = share

    def frozen(self, network: nn.Module) -> list[str]:
        return []

    def describe(self, network: nn.Module) -> str:
        stages = len(depth_groups(network, coarse=True)) - 1
        return (
            f"{type(self).__name__}: the head first, then {stages} stages join in over {self.share:.0%} of the epochs"
        )

    def still_frozen(self, network: nn.Module, epoch: int, epochs: int) -> list[str]:
        """Names of the parameters that are not trained in an epoch.

        Args:
            network: whose stages are meant.
            epoch: counted from 0.
            epochs: of the whole training.
        """
        stages = depth_groups(network, coarse=True)[:-1]
        joined = min(len(stages), int(epoch * len(stages) / max(1.0, self.share * epochs - 1)))
        return [name for stage in stages[: len(stages) - joined] for name in stage]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wrapped = trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters:
            raise UserError(
                "trainer.strategy: expected ddp_find_unused_parameters_true for GradualUnfreezing on several devices, "
                "found ddp, which waits for the gradients of frozen layers; set it."
            )
        self._thaw(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.verify(pl_module.network)  # type: ignore[arg-type]
        self._thaw(trainer, pl_module)

    def _thaw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let join in what does in this epoch; the rest is held, and watched until the next one."""
        network: nn.Module = pl_module.network  # type: ignore[assignment]
        assert trainer.max_epochs is not None
        frozen = set(self.still_frozen(network, trainer.current_epoch, trainer.max_epochs))
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name not in frozen)
        network.train()
        if pl_module.hparams.get("batch_norm") == "stored":
            use_stored_statistics(network)
        self.hold(network)
        self.watch(network)
