"""Metrics of the validations inside a training: those of :mod:`pipeline.evaluation.metrics`, without intervals."""

from collections.abc import Callable
from typing import Any

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
        # Targets are the data's own, and were checked there; here that would have the host wait once more a batch.
        given: dict[str, Any] = {"num_classes": classes, "validate_args": False}
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(average="micro", **given),
                "macro_f1": MulticlassF1Score(average="macro", **given),
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


class MeanLoss(Metric):
    """The mean loss of images whose batches' means are known, on the device; NaN where one of them is.

    (The mean of torchmetrics looks for NaN, for which the host waits; that of 1.9.0, told not to, forgets the weights.)
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, images: int) -> None:
        """Add the mean loss of so many images, float ``()``."""
        self.total += loss.detach() * images
        self.images += images

    def compute(self) -> Tensor:
        return self.total / self.images


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
