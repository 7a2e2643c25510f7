"""A solved head first, then everything: linear probing, then fine-tuning."""

from torch import nn

from pipeline.finetuning.solving import SolvedHead


class ProbeThenFineTune(SolvedHead):
    """The head is solved on features of the network as it was loaded, then everything is trained.

    A head that starts at random distorts the features while it learns; one that already fits them changes them less
    (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
    """

    def frozen(self, network: nn.Module) -> list[str]:
        return []

    def describe(self, network: nn.Module) -> str:
        total = len(list(network.parameters()))
        return f"{type(self).__name__}: the head is solved on features, then all {total} parameter tensors are trained"
