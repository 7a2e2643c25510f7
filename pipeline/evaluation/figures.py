"""Figures of an evaluation."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray


def confusion_figure(counts: NDArray[np.int64], classes: Sequence[str], title: str) -> Figure:
    """A confusion matrix as a picture: shares of each true class as colour, counts as numbers.

    Args:
        counts: ``(C, C)``, row the true class, column the predicted one.
        classes: names in order.
        title: above the picture.
    """
    count = len(classes)
    side = min(14.0, 3.2 + 0.62 * count)
    figure = Figure(figsize=(side + 0.8, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046, pad=0.03)
    axes.set_xticks(range(count), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), classes)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if count <= 30:  # numbers in smaller cells could not be read
        for row in range(count):
            for column in range(count):
                color = "white" if shares[row, column] > 0.6 else "black"
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color)
    return figure


def presence_figure(
    targets: NDArray[np.int64], labels: NDArray[np.int64], classes: Sequence[str], title: str
) -> Figure:
    """Of each class, how many images were found, missed and wrongly given it, as bars.

    Args:
        targets: ``(N, C)`` of 0 and 1: which classes an image has.
        labels: ``(N, C)`` of 0 and 1: which were predicted.
        classes: names in order.
        title: above the picture.
    """
    figure = Figure(figsize=(7.0, 1.6 + 0.3 * len(classes)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    parts = {
        "found": (targets * labels, "tab:blue"),
        "missed": (targets * (1 - labels), "lightsteelblue"),
        "wrongly given": ((1 - targets) * labels, "tab:orange"),
    }
    start = np.zeros(len(classes))
    for name, (hits, color) in parts.items():
        counts = hits.sum(axis=0)
        axes.barh(range(len(classes)), counts, left=start, color=color, label=name)
        start = start + counts
    axes.set_yticks(range(len(classes)), classes)
    axes.invert_yaxis()
    axes.set(xlabel="images", title=title)
    axes.legend(loc="lower right")
    return figure
