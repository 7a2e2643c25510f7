"""Suspected wrong labels: images that a simple classifier, trained on the others, takes for another class."""

import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler

from datamodules.audit.neighbours import nearest

_FOLDS = 5
_NEIGHBOURS = 10
_REGULARISATION = 0.01  # C of the regression on standardised features
#: Of classes with fewer images nothing is said: there is too little to compare them with.
FEWEST = 5

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Suspect:
    """An image whose label may be wrong.

    Attributes:
        row: of the image.
        given: its classes.
        suggested: what they may be instead.
        score: estimated probability that the doubted part of the label is right, in [0, 1].
    """

    row: int
    given: tuple[str, ...]
    suggested: tuple[str, ...]
    score: float


@dataclass(frozen=True)
class Judgement:
    """What was found.

    Attributes:
        scores: of every image, float64 ``(N,)``, as in :class:`Suspect`; NaN where nothing can be said.
        suspects: the images that should be looked at, the most doubtful first.
    """

    scores: Floats
    suspects: list[Suspect]


def judge_labels(
    labels: Sequence[tuple[str, ...]],
    features: NDArray[np.float32],
    together: Sequence[Hashable],
    multi_label: bool = False,
    seed: int = 0,
) -> Judgement:
    """Rank images by how much their labels contradict the other images.

    Five times a fifth of the images is judged by the rest: by a logistic regression on standardised features and by the
    ten nearest neighbours (cosine), whose probabilities are averaged. The score is the probability of the given label
    (self-confidence). Suspects are those for which another class is more probable than the given one and at least as
    probable as it is, on average, for the images that bear it (confident learning: C. G. Northcutt et al., "Confident
    Learning: Estimating Uncertainty in Dataset Labels", JAIR 2021). With several classes an image, each class is judged
    by itself and the worst counts.

    Args:
        labels: the classes of each image.
        features: of a network that was not trained on these labels, ``(N, F)``.
        together: images that share a value (copies, a group) are judged in the same fold, so that none vouches for
            another.
        multi_label: whether an image has any number of classes.
        seed: of the folds.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> truth = np.repeat([0, 1], 50)
        >>> features = rng.normal(size=(100, 8)).astype(np.float32) + 4 * truth[:, None]
        >>> labels = [("dog",) if number else ("cat",) for number in truth]
        >>> labels[7] = ("dog",)
        >>> judge_labels(labels, features, range(100)).suspects[0].row
        7
    """
    counts = Counter(name for names in labels for name in names)
    classes = sorted(counts)
    number = {name: index for index, name in enumerate(classes)}
    unit = np.unique([str(value) for value in together], return_inverse=True)[1]
    rarest = np.array(
        [min((number[name] for name in names), key=lambda c: counts[classes[c]], default=-1) for names in labels]
    )
    folds = _folds(rarest, unit, seed)
    judged = np.array([all(counts[name] >= FEWEST for name in names) for names in labels], bool)
    if not folds or len(classes) < 2:
        return Judgement(np.full(len(labels), np.nan), [])
    if not multi_label:
        return _judge_single(labels, classes, np.array([number[names[0]] for names in labels]), features, folds, judged)
    return _judge_several(labels, classes, features, folds, judged, counts)


def _judge_single(
    labels: Sequence[tuple[str, ...]],
    classes: list[str],
    given: Integers,
    features: NDArray[np.float32],
    folds: list[tuple[Integers, Integers]],
    judged: NDArray[np.bool_],
) -> Judgement:
    probability = _out_of_fold(features, given, len(classes), folds)
    own = probability[np.arange(len(given)), given]
    scores = np.where(judged, own, np.nan)
    other = _confident_other(probability, given, judged)
    doubted = np.flatnonzero(judged & (other >= 0)).tolist()
    suspects = [Suspect(row, labels[row], (classes[other[row]],), float(own[row])) for row in doubted]
    return Judgement(scores, sorted(suspects, key=lambda suspect: suspect.score))


def _judge_several(
    labels: Sequence[tuple[str, ...]],
    classes: list[str],
    features: NDArray[np.float32],
    folds: list[tuple[Integers, Integers]],
    judged: NDArray[np.bool_],
    counts: Counter[str],
) -> Judgement:
    scores = np.where(judged, 1.0, np.nan)
    worst: dict[int, Suspect] = {}
    for name in classes:
        if not FEWEST <= counts[name] <= len(labels) - FEWEST:
            continue
        given = np.array([int(name in names) for names in labels])
        probability = _out_of_fold(features, given, 2, folds)
        own = probability[np.arange(len(given)), given]
        scores = np.minimum(scores, own)  # NaN stays
        other = _confident_other(probability, given, judged)
        for row in np.flatnonzero(judged & (other >= 0)).tolist():
            if row not in worst or own[row] < worst[row].score:
                names = labels[row]
                changed = tuple(n for n in names if n != name) if name in names else (*names, name)
                worst[row] = Suspect(row, names, changed, float(own[row]))
    return Judgement(scores, sorted(worst.values(), key=lambda suspect: suspect.score))


def _folds(classes: Integers, unit: Integers, seed: int) -> list[tuple[Integers, Integers]]:
    """Rows to learn from and rows to judge; none where there are too few units of everything."""
    if len(np.unique(unit)) < _FOLDS or np.bincount(classes[classes >= 0]).max(initial=0) < _FOLDS:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with few images is missing from some folds
        splitter = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
        return list(splitter.split(np.zeros((len(classes), 1)), classes, unit))


def _out_of_fold(
    features: NDArray[np.float32], given: Integers, count: int, folds: list[tuple[Integers, Integers]]
) -> Floats:
    """Class probabilities of each image, from images of other folds alone: ``(N, count)``."""
    unit = features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-12)
    probability = np.zeros((len(given), count))
    for learn, judge in folds:
        if not len(judge) or len(np.unique(given[learn])) < 2:
            continue
        scaler = StandardScaler().fit(features[learn])
        regression = LogisticRegression(C=_REGULARISATION, max_iter=500)
        regression.fit(scaler.transform(features[learn]), given[learn])
        linear = np.zeros((len(judge), count))
        linear[:, regression.classes_] = regression.predict_proba(scaler.transform(features[judge]))
        near, _ = nearest(unit[judge], unit[learn], _NEIGHBOURS)
        found = near >= 0
        votes = (np.eye(count)[given[learn][near]] * found[:, :, None]).sum(1) / np.maximum(1, found.sum(1))[:, None]
        probability[judge] = (linear + votes) / 2
    return probability


def _confident_other(probability: Floats, given: Integers, judged: NDArray[np.bool_]) -> Integers:
    """The class that an image confidently seems to be of instead of the given one; -1: none."""
    own = probability[np.arange(len(given)), given]
    count = probability.shape[1]
    usual = np.array(
        [own[judged & (given == c)].mean() if (judged & (given == c)).any() else np.inf for c in range(count)]
    )
    confident = (probability >= usual) & (probability > own[:, None])
    best = np.where(confident, probability, -1.0).argmax(1)
    return np.where(confident.any(1), best, -1)
