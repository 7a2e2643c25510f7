"""Metrics of the validations inside a training: those of :mod:`pipeline.evaluation.metrics`, without intervals."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from pipeline.evaluation.metrics import Weights, accuracy, macro_f1, mean_average_precision
from pipeline.evaluation.predictions import Predictions


def validation_metrics(classes: int, multi_label: bool) -> MetricCollection:
    """Metrics that take probabilities ``(N, classes)`` and targets, batch by batch.

    Args:
        classes: how many there are.
        multi_label: whether an image may have several; targets are then ``(N, classes)`` of 0 and 1, else ``(N,)``.
    """
    if not multi_label:
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes=classes, average="micro"),
                "macro_f1": MulticlassF1Score(num_classes=classes, average="macro"),
            },
            prefix="val/",
        )
    measures = {"accuracy": accuracy, "macro_f1": macro_f1, "mean_average_precision": mean_average_precision}
    # One group: what they keep is the same, and is kept once.
    return MetricCollection(
        {name: MultiLabelMetric(measure) for name, measure in measures.items()},
        prefix="val/",
        compute_groups=[list(measures)],
    )


class MultiLabelMetric(Metric):
    """A metric of all images together, where one may have several classes.

    (Those of torchmetrics count classes that are neither present nor predicted as failures, or give no number.)

    Args:
        measure: of :mod:`pipeline.evaluation.metrics`.
    """

    full_state_update = False
    probabilities: list[Tensor]
    targets: list[Tensor]

    def __init__(self, measure: Callable[[Predictions, Weights], float]) -> None:
        super().__init__()
        self.measure = measure
        self.add_state("probabilities", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        self.probabilities.append(probabilities)
        self.targets.append(targets)

    def compute(self) -> Tensor:
        # Between processes lists become tensors.
        probabilities, targets = (
            (torch.cat(kept) if isinstance(kept, list) else kept).cpu() for kept in (self.probabilities, self.targets)
        )
        predictions = Predictions(targets.long().numpy(), probabilities.double().numpy(), multi_label=True)
        return torch.tensor(self.measure(predictions, None), device=self.device)
