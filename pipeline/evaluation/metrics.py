"""Metrics of a set of predictions, each with its interval and its sample count."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from pipeline.evaluation.predictions import Predictions

RESAMPLES = 2000
#: In place of a split's name: training images, each judged by a model that had not seen it.
OUT_OF_FOLD = "out_of_fold"
# Weights that are held at a time: 2 MB.
_BLOCK = 2**18

Weights = NDArray[np.int64] | None
#: A metric of weighted images: one value, or one for each row of weights.
Value = Any


@dataclass(frozen=True)
class Estimate:
    """A metric's value with a 95 % interval.

    Attributes:
        value: on all images.
        low: 2.5th percentile of the bootstrap, or what :func:`estimate_metrics` puts in its place.
        high: 97.5th percentile of the bootstrap, or what is put in its place.
        n: number of images.
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as ``summary.json`` keeps them; a bound that is infinite is None."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    def bounds(self, name: str) -> dict[str, float]:
        """The bounds that are finite, called ``<name>_low`` and ``<name>_high``."""
        bounds = {f"{name}_low": self.low, f"{name}_high": self.high}
        return {bound: value for bound, value in bounds.items() if math.isfinite(value)}


def accuracy(predictions: Predictions, weights: Weights = None) -> Value:
    """Share of images whose label is right, in [0, 1]; of several classes an image, all of them.

    Args:
        predictions: with known targets.
        weights: how often each image counts, int64 ``(N,)`` or, for several values at once, ``(B, N)``; None: once.

    Returns:
        float64, one or ``(B,)``.
    """
    return _mean(predictions.right, weights)


def macro_f1(predictions: Predictions, weights: Weights = None) -> Value:
    """Unweighted mean of the classes' F1 scores, in [0, 1]; classes neither present nor predicted are left out.

    Without any class, present or predicted, the value is 1. Arguments as of :func:`accuracy`.
    """
    targets, labels = predictions.targets, predictions.labels
    times = _or_once(weights, predictions).astype(np.float64)  # whole numbers all the way, and products of matrices
    if predictions.multi_label:
        hits = times @ (targets & labels).astype(np.float64)
        mentions = times @ (targets + labels).astype(np.float64)  # 2 TP + FP + FN
    else:
        of_truth, of_label = (_of_classes(found, predictions) for found in (targets, labels))
        hits = _by_class(times * predictions.right, of_truth)
        mentions = _by_class(times, of_truth) + _by_class(times, of_label)
    there = mentions > 0
    scores = 2 * hits / np.where(there, mentions, 1)
    count = there.sum(axis=-1)
    return np.where(count > 0, scores.sum(axis=-1) / np.maximum(count, 1), 1.0)[()]


def log_loss(predictions: Predictions, weights: Weights = None) -> Value:
    """Mean negative logarithm of the truth's probability, in nats; 0 is best.

    Of several classes an image, that of each class being present or absent, averaged over the classes. Arguments as of
    :func:`accuracy`.
    """
    return _mean(predictions.losses, weights)


def mean_average_precision(predictions: Predictions, weights: Weights = None) -> Value:
    """Mean over classes of the average precision, in [0, 1]: how well a class's images are ranked before others.

    For several classes an image; classes without an image are left out, and without any the value is 0. Arguments as of
    :func:`accuracy`.
    """
    if weights is not None and weights.ndim == 2:
        return np.array([mean_average_precision(predictions, row) for row in weights])
    ranking = predictions.ranking
    ranked = np.take(_or_once(weights, predictions), ranking.order)
    own = np.take(ranked, ranking.places)
    seen = np.take(np.cumsum(ranked, axis=1), ranking.ends)
    hits = np.take(np.cumsum(ranked * ranking.present, axis=1), ranking.ends)
    precision = hits / np.maximum(seen, 1)
    images = np.bincount(ranking.classes, own)
    precisions = np.bincount(ranking.classes, own * precision)
    there = images > 0
    return np.float64(np.mean(precisions[there] / images[there]) if there.any() else 0.0)


def _mean(values: NDArray[Any], weights: Weights) -> Value:
    if weights is None:
        return values.mean()
    return weights @ values.astype(np.float64) / weights.sum(axis=-1)


def _or_once(weights: Weights, predictions: Predictions) -> NDArray[np.int64]:
    return np.ones(len(predictions.targets), np.int64) if weights is None else weights


def _of_classes(found: NDArray[np.int64], predictions: Predictions) -> csr_array:
    """Of each image the class that was found, as 1 in a row of zeros, ``(N, C)``."""
    shape = predictions.probabilities.shape
    return csr_array((np.ones(len(found)), found, np.arange(len(found) + 1)), shape=shape)


def _by_class(weights: NDArray[np.float64], of_classes: csr_array) -> NDArray[np.float64]:
    return (of_classes.T @ weights.T).T


def confusion_matrix(targets: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Counts, int64 ``(classes, classes)``: row the true class, column the predicted one."""
    return np.bincount(targets * classes + labels, minlength=classes**2).reshape(classes, classes)


METRICS: dict[str, Callable[[Predictions, Weights], Value]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "log_loss": log_loss,
}
#: From where to where they go, if not from 0 to 1.
_RANGES = {"log_loss": (0.0, math.inf)}
#: Where an image may have several classes.
MULTI_LABEL_METRICS = {**METRICS, "mean_average_precision": mean_average_precision}


def estimate_metrics(
    predictions: Predictions, groups: Sequence[str] | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Estimate]:
    """Every metric with its 95 % percentile bootstrap interval over images, or over groups where there are any.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; images of one patient or scene are not
    independent, so that resampling them one by one would promise too much. Where all images are right, or none is, all
    resamples agree, however few images there are. Then accuracy has the bound that an exact test of so many images (or
    groups) leaves at 5 % (Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404; some 3 / N from the end),
    and what is 1 or 0 with it has the same, for want of a better one: where a class is rare, it promises too much.
    One group alone says nothing of others, and its interval is all that a metric can be.

    Args:
        predictions: with known targets.
        groups: what each image belongs to; an empty name stands for a group of its own.
        seed: of the resampling.
        resamples: how many.
    """
    metrics = MULTI_LABEL_METRICS if predictions.multi_label else METRICS
    count = len(predictions.targets)
    values: dict[str, list[Value]] = {name: [] for name in metrics}
    for times in resampled(count, groups, seed, resamples):
        for name, metric in metrics.items():
            values[name].append(metric(predictions, times))
    estimates = {}
    units = units_of(count, groups).max() + 1
    for name, metric in metrics.items():
        low, high = map(float, np.percentile(np.concatenate(values[name]), (2.5, 97.5)))
        if units == 1:
            low, high = range_of(name)
        estimates[name] = Estimate(float(metric(predictions, None)), low, high, count)
    end = estimates["accuracy"].value
    if end in (0, 1) and units > 1:
        bound = 0.05 ** (1 / units) if end == 1 else 1 - 0.05 ** (1 / units)
        for name, found in estimates.items():
            if name != "log_loss" and found.value == end:
                estimates[name] = replace(found, low=min(end, bound), high=max(end, bound))
    return estimates


def range_of(metric: str) -> tuple[float, float]:
    """The least and the most that a metric can be."""
    return _RANGES.get(metric, (0.0, 1.0))


def resampled(count: int, groups: Sequence[str] | None, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """How often each of ``count`` images is drawn in each resample of a bootstrap, in blocks of int64 ``(B, count)``.

    As weights they give what a metric of the drawn images would, without copying. Arguments as of
    :func:`estimate_metrics`.
    """
    group_of = units_of(count, groups)
    draws = group_of.max() + 1
    rng = np.random.default_rng(seed)
    most = max(1, _BLOCK // max(1, count))
    for start in range(0, resamples, most):
        rows = min(most, resamples - start)
        drawn = rng.integers(0, draws, (rows, draws)) + draws * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * draws).reshape(rows, draws)[:, group_of]


def units_of(count: int, groups: Sequence[str] | None) -> NDArray[np.int64]:
    """Of each image the number of its group, counted from 0 in order of appearance, int64 ``(count,)``.

    Args:
        count: of images.
        groups: what each image belongs to; an empty name stands for a group of its own; None: each image does.
    """
    if groups is None:
        return np.arange(count)
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(group if group else row, len(numbers)) for row, group in enumerate(groups)])
