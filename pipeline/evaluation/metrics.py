"""Metrics of a set of predictions, each with its interval and its sample count."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.predictions import Predictions

RESAMPLES = 2000

Weights = NDArray[np.int64] | None


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


def accuracy(predictions: Predictions, weights: Weights = None) -> float:
    """Share of images whose label is right, in [0, 1]; of several classes an image, all of them.

    Args:
        predictions: with known targets.
        weights: how often each image counts, int64 ``(N,)``; None: once.
    """
    return float(np.average(predictions.right, weights=weights))


def macro_f1(predictions: Predictions, weights: Weights = None) -> float:
    """Unweighted mean of the classes' F1 scores, in [0, 1]; classes neither present nor predicted are left out.

    Without any class, present or predicted, the value is 1. Arguments as of :func:`accuracy`.
    """
    targets, labels = predictions.targets, predictions.labels
    weights = _or_once(weights, predictions)
    if predictions.multi_label:
        hits = weights @ (targets & labels)
        mentions = weights @ (targets + labels)  # 2 TP + FP + FN
    else:
        count = partial(np.bincount, minlength=predictions.probabilities.shape[1])
        hits = count(targets, weights * predictions.right)
        mentions = count(targets, weights) + count(labels, weights)
    there = mentions > 0
    return float(np.mean(2 * hits[there] / mentions[there])) if there.any() else 1.0


def log_loss(predictions: Predictions, weights: Weights = None) -> float:
    """Mean negative logarithm of the truth's probability, in nats; 0 is best.

    Of several classes an image, that of each class being present or absent, averaged over the classes. Arguments as of
    :func:`accuracy`.
    """
    return float(np.average(predictions.losses, weights=weights))


def mean_average_precision(predictions: Predictions, weights: Weights = None) -> float:
    """Mean over classes of the average precision, in [0, 1]: how well a class's images are ranked before others.

    For several classes an image; classes without an image are left out, and without any the value is 0. Arguments as of
    :func:`accuracy`.
    """
    ranking = predictions.ranking
    ranked = np.take(_or_once(weights, predictions), ranking.order)
    own = np.take(ranked, ranking.places)
    seen = np.take(np.cumsum(ranked, axis=1), ranking.ends)
    hits = np.take(np.cumsum(ranked * ranking.present, axis=1), ranking.ends)
    precision = hits / np.maximum(seen, 1)
    images = np.bincount(ranking.classes, own)
    precisions = np.bincount(ranking.classes, own * precision)
    there = images > 0
    return float(np.mean(precisions[there] / images[there])) if there.any() else 0.0


def _or_once(weights: Weights, predictions: Predictions) -> NDArray[np.int64]:
    return np.ones(len(predictions.targets), np.int64) if weights is None else weights


def confusion_matrix(targets: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Counts, int64 ``(classes, classes)``: row the true class, column the predicted one."""
    return np.bincount(targets * classes + labels, minlength=classes**2).reshape(classes, classes)


METRICS: dict[str, Callable[[Predictions, Weights], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "log_loss": log_loss,
}
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
    values = {name: np.empty(resamples) for name in metrics}
    for i, times in enumerate(resampled(count, groups, seed, resamples)):
        for name, metric in metrics.items():
            values[name][i] = metric(predictions, times)
    bounds = {name: np.percentile(found, (2.5, 97.5)) for name, found in values.items()}
    return {
        name: Estimate(metric(predictions, None), float(bounds[name][0]), float(bounds[name][1]), count)
        for name, metric in metrics.items()
    }


def resampled(count: int, groups: Sequence[str] | None, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """How often each of ``count`` images is drawn, int64 ``(count,)``, for every resample of a bootstrap.

    As a weight it gives what a metric of the drawn images would, without copying. Arguments as of
    :func:`estimate_metrics`.
    """
    group_of = np.arange(count) if groups is None else _group_numbers(groups)
    draws = group_of.max() + 1
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(0, draws, draws), minlength=draws)[group_of]


def _group_numbers(groups: Sequence[str]) -> NDArray[np.int64]:
    """Of each image, the number of its group, counted from 0 in order of appearance."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(group if group else row, len(numbers)) for row, group in enumerate(groups)])
