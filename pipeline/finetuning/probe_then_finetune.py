"""A solved head first, then the network: linear probing, then fine-tuning."""

from torch import nn

from pipeline.finetuning.freezing import early_parameters
from pipeline.finetuning.solving import SolvedHead


class ProbeThenFineTune(SolvedHead):
    """The head is solved on features of the pretrained network, then all but the first stages is trained.

    A head that starts at random distorts the features while it learns; one that already fits them changes them less
    (Kumar et al. 2022, https://arxiv.org/abs/2202.10054). Before it is solved, batch normalisations are measured on the
    training images, so that it fits the features that training sees (:mod:`~pipeline.finetuning.statistics`). What is
    handed over may lie between the two networks, the one with the solved head and the one after the last epoch
    (:mod:`~pipeline.finetuning.interpolation`).

    Args:
        features: folder where features are kept; none: below ``~/.cache``.
        measure: measure statistics of batch normalisations; otherwise those that the weights brought are used.
        interpolate: choose a network between both by the validation images; otherwise, and where a metric to choose by
            or a patience is named, the best epoch is taken.
        freeze_early: the first stages keep what they have learned, those that have this share of the backbone's weights
            together at most; true: 0.02 (:func:`~pipeline.finetuning.freezing.early_parameters`); false: everything
            is trained.
    """

    def __init__(
        self,
        features: str | None = None,
        interpolate: bool = True,
        measure: bool = True,
        freeze_early: bool | float = True,
    ) -> None:
        super().__init__(features)
        self.measures = measure
        self.interpolates = interpolate
        self.freeze_early = freeze_early

    def frozen(self, network: nn.Module) -> list[str]:
        return early_parameters(network, self.freeze_early)

    def describe(self, network: nn.Module) -> str:
        total, frozen = len(list(network.parameters())), len(self.frozen(network))
        trained = f"{total - frozen} of {total}" if frozen else f"all {total}"
        where = " above the first stages" if frozen else ""
        return f"{type(self).__name__}: the head is solved on features, then {trained} tensors{where} are trained"
