"""Whether the files alone, without a look at the pictures, tell the class: a shortcut that a network will learn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.tree import DecisionTreeClassifier

from datamodules.audit.inspection import ImageFacts

_FOLDS = 5
_DEPTH = 3
#: How far from chance (0) to certainty (1) the files must tell.
TELLING = 0.25
_FEWEST = 20  # readable images


@dataclass(frozen=True)
class Shortcut:
    """Properties of the files that tell the class.

    Attributes:
        accuracy: mean over the classes of the share that a small decision tree recognises, on images that it did not
            see, in [0, 1].
        chance: the same of a guess, one divided by the number of classes.
        properties: what the tree looks at, the most telling first.
    """

    accuracy: float
    chance: float
    properties: tuple[str, ...]


def find_shortcut(facts: Sequence[ImageFacts], targets: Sequence[str], seed: int = 0) -> Shortcut | None:
    """Try to tell the targets from size, shape, format and mode of the files.

    Args:
        facts: of readable images.
        targets: class (or split) of each.
        seed: of the folds of the cross-validation.

    Returns:
        None where the files tell less than a quarter of the way from chance to certainty.

    Example:
        >>> facts = [ImageFacts(width=640 if row % 2 else 800, height=480) for row in range(40)]
        >>> find_shortcut(facts, ["cat" if row % 2 else "dog" for row in range(40)]).properties
        ('width',)
    """
    table = _properties(facts)
    _, classes, counts = np.unique(targets, return_inverse=True, return_counts=True)
    kept = np.isin(classes, np.flatnonzero(counts >= _FOLDS))
    if kept.sum() < _FEWEST or len(np.unique(classes[kept])) < 2:
        return None
    values, given = np.stack(list(table.values()), 1)[kept], classes[kept]
    tree = DecisionTreeClassifier(max_depth=_DEPTH, min_samples_leaf=5, class_weight="balanced", random_state=seed)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    guessed = cross_val_predict(tree, values, given, cv=folds)
    present = np.unique(given)
    accuracy = float(np.mean([(guessed[given == c] == c).mean() for c in present]))
    chance = 1 / len(present)
    if accuracy < chance + TELLING * (1 - chance):
        return None
    weights = tree.fit(values, given).feature_importances_
    telling = [name for _, name in sorted(zip(-weights, table, strict=True)) if weights[list(table).index(name)] > 0.1]
    return Shortcut(round(accuracy, 4), round(chance, 4), tuple(telling))


def _properties(facts: Sequence[ImageFacts]) -> dict[str, NDArray[np.float64]]:
    def codes(values: list[str]) -> NDArray[np.float64]:
        return np.unique(values, return_inverse=True)[1].astype(np.float64)

    width = np.array([fact.width for fact in facts], np.float64)
    height = np.array([fact.height for fact in facts], np.float64)
    return {
        "width": width,
        "height": height,
        "width to height": width / np.maximum(height, 1),
        "file format": codes([fact.format for fact in facts]),
        "colour mode": codes([fact.mode for fact in facts]),
        "bits": np.array([fact.bits for fact in facts], np.float64),
    }
