"""Two models on the same images: how much better one is, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from pipeline.evaluation.metrics import (
    METRICS,
    MULTI_LABEL_METRICS,
    RESAMPLES,
    Estimate,
    Value,
    range_of,
    resampled,
    units_of,
)
from pipeline.evaluation.predictions import Predictions

_LOWER_IS_BETTER = ("log_loss",)
_BINS = 15


@dataclass(frozen=True)
class McNemar:
    """Images on which exactly one of two models is right, or groups of which one model has more right.

    Attributes:
        won: by the first.
        lost: to the second.
        p: of a split as uneven or more, if neither were better; exact and two-sided.
    """

    won: int
    lost: int
    p: float


def paired_differences(
    one: Predictions,
    other: Predictions,
    groups: Sequence[str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Estimate]:
    """How much better one model is than another on the same images, by every metric, with percentile bootstrap bounds.

    Both are looked at on the same resampled images, so that what is hard for both does not count as chance. Above 0 the
    first is better, also by the log loss. One group alone says nothing of others: the bounds are all that there can be.

    Args:
        one: with known targets.
        other: of the same images in the same order.
        groups: what each image belongs to; these are resampled in place of images.
        confidence: of the interval, in (0, 1).
        seed: of the resampling.
        resamples: how many.
    """
    metrics = MULTI_LABEL_METRICS if one.multi_label else METRICS
    signs = {name: -1 if name in _LOWER_IS_BETTER else 1 for name in metrics}
    values: dict[str, list[Value]] = {name: [] for name in metrics}
    count = len(one.targets)
    for times in resampled(count, groups, seed, resamples):
        for name, metric in metrics.items():
            values[name].append(signs[name] * (metric(one, times) - metric(other, times)))
    tail, alone = 50 * (1 - confidence), units_of(count, groups).max() == 0
    found = {}
    for name, metric in metrics.items():
        low, high = np.percentile(np.concatenate(values[name]), (tail, 100 - tail))
        if alone:
            least, most = range_of(name)
            low, high = least - most, most - least
        value = signs[name] * (metric(one, None) - metric(other, None))
        found[name] = Estimate(float(value), float(low), float(high), count)
    return found


def mcnemar(one: Predictions, other: Predictions, groups: Sequence[str] | None = None) -> McNemar:
    """McNemar's test on which images each model answers rightly (McNemar 1947), exact as a binomial test.

    Images of one group are not independent, so that each group counts once, for the model that has more of it right:
    the sign test (Arbuthnot 1710), which without groups is the same.

    Args:
        one: with known targets.
        other: of the same images in the same order.
        groups: what each image belongs to.
    """
    ahead = np.bincount(units_of(len(one.targets), groups), one.right.astype(float) - other.right)
    won, lost = int((ahead > 0).sum()), int((ahead < 0).sum())
    return McNemar(won, lost, float(binomtest(won, won + lost).pvalue) if won + lost else 1.0)


def expected_calibration_error(predictions: Predictions) -> float:
    """Mean distance between how sure answers are and how often they are right, in [0, 1] (Guo et al. 2017).

    In 15 bins of equal width by the score. Where an image may have several classes, over the answers for every class:
    present or absent.
    """
    if predictions.multi_label:
        sure = np.maximum(predictions.probabilities, 1 - predictions.probabilities).ravel()
        right = (predictions.labels == predictions.targets).ravel()
    else:
        sure, right = predictions.scores, predictions.right
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, right - sure, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(sure))


def recalls(predictions: Predictions) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Share of each class's images that are found, float64 ``(C,)``, and their number, int64 ``(C,)``.

    Of a class without images the share is not a number.
    """
    classes = np.arange(predictions.probabilities.shape[1])
    several = predictions.multi_label
    truths = predictions.targets == 1 if several else predictions.targets[:, None] == classes
    said = predictions.labels == 1 if several else predictions.labels[:, None] == classes
    counts = truths.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return (truths & said).sum(axis=0) / counts, counts
