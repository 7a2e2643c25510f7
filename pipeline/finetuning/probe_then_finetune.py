"""A solved head first, then everything: linear probing, then fine-tuning."""

from torch import nn

from pipeline.finetuning.solving import SolvedHead


class ProbeThenFineTune(SolvedHead):
    """The head is solved on features of the pretrained network, then everything is trained.

    A head that starts at random distorts the features while it learns; one that already fits them changes them less
    (Kumar et al. 2022, https://arxiv.org/abs/2202.10054). Before it is solved, batch normalisations are measured on the
    training images, so that it fits the features that training sees (:mod:`~pipeline.finetuning.statistics`). What is
    handed over may lie between the two networks, the one with the solved head and the one after the last epoch
    (:mod:`~pipeline.finetuning.interpolation`).

    Args:
        features: folder where features are kept; none: below ``~/.cache``.
        measure: measure statistics of batch normalisations; otherwise those that the weights brought are used.
        interpolate: choose a network between both by the validation images; otherwise the best epoch is taken.
    """

    def __init__(self, features: str | None = None, interpolate: bool = True, measure: bool = True) -> None:
        super().__init__(features)
        self.measures = measure
        self.interpolates = interpolate

    def frozen(self, network: nn.Module) -> list[str]:
        return []

    def describe(self, network: nn.Module) -> str:
        total = len(list(network.parameters()))
        return f"{type(self).__name__}: the head is solved on features, then all {total} parameter tensors are trained"
