"""Everything is trained, from a fresh head on."""

from torch import nn

from pipeline.finetuning.strategy import Strategy


class FullFineTuning(Strategy):
    """All parameters are trained."""

    def frozen(self, network: nn.Module) -> list[str]:
        return []
