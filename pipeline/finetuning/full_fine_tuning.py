"""Everything is trained, from a fresh head on."""

from torch import nn

from pipeline.finetuning.freezing import early_parameters
from pipeline.finetuning.strategy import Strategy


class FullFineTuning(Strategy):
    """The head starts at random, and all parameters are trained, or all above the first stages.

    Args:
        freeze_early: the first stages keep what they have learned, those that have this share of the backbone's weights
            together at most; true: 0.02 (:func:`~pipeline.finetuning.freezing.early_parameters`).
    """

    def __init__(self, freeze_early: bool | float = False) -> None:
        super().__init__()
        self.freeze_early = freeze_early

    def frozen(self, network: nn.Module) -> list[str]:
        return early_parameters(network, self.freeze_early)
