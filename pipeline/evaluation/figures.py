"""Figures of an evaluation."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

_MOST_BARS = 60


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

    Of more than 60 classes, those with the most mistakes.

    Args:
        targets: ``(N, C)`` of 0 and 1: which classes an image has.
        labels: ``(N, C)`` of 0 and 1: which were predicted.
        classes: names in order.
        title: above the picture.
    """
    parts = {
        "found": ((targets * labels).sum(axis=0), "tab:blue"),
        "missed": ((targets * (1 - labels)).sum(axis=0), "lightsteelblue"),
        "wrongly given": (((1 - targets) * labels).sum(axis=0), "tab:orange"),
    }
    shown = np.arange(len(classes))
    if len(classes) > _MOST_BARS:
        mistakes = parts["missed"][0] + parts["wrongly given"][0]
        shown = np.sort(np.argsort(-mistakes, kind="stable")[:_MOST_BARS])
        title = f"{title}\nthe {_MOST_BARS} of {len(classes):,} classes with the most mistakes"
    figure = Figure(figsize=(7.5, 1.7 + 0.28 * len(shown)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    start = np.zeros(len(shown))
    for name, (counts, color) in parts.items():
        axes.barh(range(len(shown)), counts[shown], left=start, color=color, label=name)
        start = start + counts[shown]
    axes.set_yticks(range(len(shown)), [classes[int(i)] for i in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)  # the first class on top
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="images", title=title)
    figure.legend(loc="outside lower center", ncols=len(parts), frameon=False)
    return figure
