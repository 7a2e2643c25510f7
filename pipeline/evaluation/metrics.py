"""Metrics of a set of predictions, each with its interval and its sample count."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.predictions import Predictions

RESAMPLES = 2000
_SMALLEST_PROBABILITY = 1e-15  # as scikit-learn's log_loss clips, so that one certain mistake stays finite


@dataclass(frozen=True)
class Estimate:
    """A metric's value with a 95 % interval.

    Attributes:
        value: on all images.
        low: 2.5th percentile of the bootstrap.
        high: 97.5th percentile of the bootstrap.
        n: number of images.
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as ``summary.json`` keeps them."""
        return asdict(self)


def accuracy(predictions: Predictions) -> float:
    """Share of images whose label is right, in [0, 1]; of several classes an image, all of them."""
    right = predictions.labels == predictions.targets
    return float((right.all(axis=1) if predictions.multi_label else right).mean())


def macro_f1(predictions: Predictions) -> float:
    """Unweighted mean of the classes' F1 scores, in [0, 1]; classes neither present nor predicted are left out."""
    targets, labels = predictions.targets, predictions.labels
    if predictions.multi_label:
        hits = (targets * labels).sum(axis=0)
        mentions = targets.sum(axis=0) + labels.sum(axis=0)
    else:
        confusion = confusion_matrix(targets, labels, predictions.probabilities.shape[1])
        hits = np.diag(confusion)
        mentions = confusion.sum(axis=0) + confusion.sum(axis=1)  # 2 TP + FP + FN
    if not mentions.any():
        return 1.0  # no class anywhere, and none predicted
    return float(np.mean(2 * hits[mentions > 0] / mentions[mentions > 0]))


def log_loss(predictions: Predictions) -> float:
    """Mean negative logarithm of the truth's probability, in nats; 0 is best.

    Of several classes an image, that of each class being present or absent, averaged over the classes.
    """
    targets, probabilities = predictions.targets, predictions.probabilities
    if predictions.multi_label:
        of_truth = np.where(targets == 1, probabilities, 1 - probabilities)
    else:
        of_truth = np.take_along_axis(probabilities, targets[:, None], axis=1)
    return float(-np.log(np.clip(of_truth, _SMALLEST_PROBABILITY, 1.0)).mean())


def mean_average_precision(predictions: Predictions) -> float:
    """Mean over classes of the average precision, in [0, 1]: how well a class's images are ranked before others.

    For several classes an image; classes without an image are left out, and without any the value is 0.
    """
    precisions = [
        _average_precision(predictions.targets[:, column], predictions.probabilities[:, column])
        for column in range(predictions.probabilities.shape[1])
        if predictions.targets[:, column].any()
    ]
    return float(np.mean(precisions)) if precisions else 0.0


def _average_precision(present: NDArray[np.int64], scores: NDArray[np.float64]) -> float:
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(present[order])
    last_of_score = np.r_[np.diff(scores[order]) != 0, True]  # equal scores cannot be ranked
    recall = hits[last_of_score] / hits[-1]
    precision = hits[last_of_score] / (np.flatnonzero(last_of_score) + 1)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def confusion_matrix(targets: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Counts, int64 ``(classes, classes)``: row the true class, column the predicted one."""
    return np.bincount(targets * classes + labels, minlength=classes**2).reshape(classes, classes)


METRICS: dict[str, Callable[[Predictions], float]] = {"accuracy": accuracy, "macro_f1": macro_f1, "log_loss": log_loss}
#: Where an image may have several classes.
MULTI_LABEL_METRICS = {**METRICS, "mean_average_precision": mean_average_precision}


def estimate_metrics(
    predictions: Predictions, groups: Sequence[str] | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Estimate]:
    """Every metric with its 95 % percentile bootstrap interval over images, or over groups where there are any.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; images of one patient or scene are not
    independent, so that resampling them one by one would promise too much.

    Args:
        predictions: with known targets.
        groups: what each image belongs to; an empty name stands for a group of its own.
        seed: of the resampling.
        resamples: how many.
    """
    metrics = MULTI_LABEL_METRICS if predictions.multi_label else METRICS
    count = len(predictions.targets)
    rng = np.random.default_rng(seed)
    members = None if groups is None else _members(groups)
    draws = {name: np.empty(resamples) for name in metrics}
    for i in range(resamples):
        if members is None:
            chosen = rng.integers(0, count, count)
        else:
            chosen = np.concatenate([members[group] for group in rng.integers(0, len(members), len(members))])
        drawn = Predictions(predictions.targets[chosen], predictions.probabilities[chosen], predictions.multi_label)
        for name, metric in metrics.items():
            draws[name][i] = metric(drawn)
    bounds = {name: np.percentile(values, (2.5, 97.5)) for name, values in draws.items()}
    return {
        name: Estimate(metric(predictions), float(bounds[name][0]), float(bounds[name][1]), count)
        for name, metric in metrics.items()
    }


def _members(groups: Sequence[str]) -> list[NDArray[np.int64]]:
    rows: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group if group else row, []).append(row)
    return [np.array(found) for found in rows.values()]
