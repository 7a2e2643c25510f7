"""Metrics of a set of predictions, each with its interval and its sample count."""

from collections.abc import Callable
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


def accuracy(targets: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Share of images whose most probable class is the true one, in [0, 1]."""
    return float((probabilities.argmax(axis=1) == targets).mean())


def macro_f1(targets: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Unweighted mean of the classes' F1 scores, in [0, 1]; classes neither present nor predicted are left out."""
    classes = probabilities.shape[1]
    confusion = confusion_matrix(targets, probabilities.argmax(axis=1), classes)
    hits = np.diag(confusion)
    mentions = confusion.sum(axis=0) + confusion.sum(axis=1)  # 2 TP + FP + FN
    return float(np.mean(2 * hits[mentions > 0] / mentions[mentions > 0]))


def log_loss(targets: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """Mean negative logarithm of the true class's probability, in nats; 0 is best."""
    return float(_surprise(targets, probabilities).mean())


def _surprise(targets: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    true_class = np.take_along_axis(probabilities, targets[:, None], axis=1)[:, 0]
    return -np.log(np.clip(true_class, _SMALLEST_PROBABILITY, 1.0))


def confusion_matrix(targets: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Counts, int64 ``(classes, classes)``: row the true class, column the predicted one."""
    return np.bincount(targets * classes + labels, minlength=classes**2).reshape(classes, classes)


METRICS: dict[str, Callable[[NDArray[np.int64], NDArray[np.float64]], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "log_loss": log_loss,
}


def estimate_metrics(predictions: Predictions, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Estimate]:
    """Every metric with its 95 % percentile bootstrap interval over images.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.

    Args:
        predictions: with known targets.
        seed: of the resampling.
        resamples: how many.
    """
    targets, probabilities = predictions.targets, predictions.probabilities
    rng = np.random.default_rng(seed)
    count = len(targets)
    draws = {name: np.empty(resamples) for name in METRICS}
    for i in range(resamples):
        chosen = rng.integers(0, count, count)
        for name, metric in METRICS.items():
            draws[name][i] = metric(targets[chosen], probabilities[chosen])
    bounds = {name: np.percentile(values, (2.5, 97.5)) for name, values in draws.items()}
    return {
        name: Estimate(metric(targets, probabilities), float(bounds[name][0]), float(bounds[name][1]), count)
        for name, metric in METRICS.items()
    }
