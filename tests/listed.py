"""Listings of images that are nowhere, for the tests of how images are divided."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from datamodules import division
from datamodules.errors import DataError
from datamodules.storage import Storage
from datamodules.table import ImageTable, Listing

#: What the expectations of these tests reckon with, whatever is usual.
SHARES = {"train": 0.65, "val": 0.15, "test": 0.2}
Division = partial(division.Division, val_fraction=SHARES["val"], test_fraction=SHARES["test"])


class Sizes(Storage):
    """Images of which only the sizes are known."""

    location = "somewhere"

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes

    def source(self, row: int) -> bytes:
        raise AssertionError("dividing opens no image")

    def size(self, row: int) -> int:
        return self.sizes[row]

    def describe(self, row: int) -> str:
        return f"image {row}"


def listing_of(labels: Sequence[str], given: Sequence[str | None] | None = None, **columns: Any) -> Listing:
    paths = columns.pop("paths", [f"{row:06d}.png" for row in range(len(labels))])
    storage = Sizes([100 + row for row in range(len(labels))])
    return Listing(storage, paths, list(labels), [None] * len(labels) if given is None else list(given), **columns)


def skewed_groups(seed: int, groups: int, classes: int, purity: float = 0.7, largest: int = 60) -> Listing:
    """Groups of very different sizes, each mostly of one class; some images stand alone."""
    rng = np.random.default_rng(seed)
    sizes = np.minimum(1 + rng.pareto(1.2, groups) * 4, largest).astype(int)
    frequency = rng.dirichlet(np.full(classes, 2.0))
    group_of = np.repeat(np.arange(groups), sizes)
    own = rng.choice(classes, groups, p=frequency)[group_of]
    label = np.where(rng.random(len(own)) < purity, own, rng.choice(classes, len(own), p=frequency))
    names = [f"g{group}" if group % 7 else "" for group in group_of]
    order = rng.permutation(len(names))
    return listing_of([f"c{label[row]}" for row in order], groups=[names[row] for row in order])


def with_several_classes(seed: int, images: int = 300, classes: int = 8, groups: int | None = None) -> Listing:
    """Images of no class, one class or several; the classes differ in frequency."""
    rng = np.random.default_rng(seed)
    has = rng.random((images, classes)) < 0.5 / np.arange(1, classes + 1)
    labels = ["|".join(f"c{column}" for column in np.flatnonzero(row)) for row in has]
    names = None if groups is None else [f"g{group}" for group in rng.integers(groups, size=images)]
    return listing_of(labels, separator="|", groups=names)


def units(listing: Listing) -> list[str]:
    """What has to stay together."""
    groups = listing.groups if listing.groups is not None else [""] * len(listing.paths)
    return [group or f"image {row}" for row, group in enumerate(groups)]


def classes(listing: Listing, rows: Sequence[int] | np.ndarray) -> set[str]:
    return {name for row in rows for name in listing.classes_of(row)}


def require_apart(table: ImageTable, drawn: Sequence[str]) -> None:
    """No drawn split has a group that another split has too."""
    names = units(table.listing)
    of_split = {split: {names[row] for row in table.rows(split)} for split in SHARES}
    for split in drawn:
        for other in SHARES.keys() - {split}:
            assert not of_split[split] & of_split[other]


def distance(table: ImageTable) -> float:
    """Root of the squared relative distance of a split from its share of a class, weighted by share, over classes."""
    counts = {split: table.counts(split) for split in SHARES}
    totals = sum(counts.values(), Counter())
    squares = [
        share * (counts[split][name] / (share * total) - 1) ** 2
        for name, total in totals.items()
        for split, share in SHARES.items()
    ]
    return float(np.sqrt(sum(squares) / len(totals)))


def refusal(listing: Listing, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        Division(**settings).divide(listing)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message


#: Of every kind, each large enough to be cut into five folds.
LISTINGS = {
    "plain": listing_of([f"c{row % 3 if row % 4 else 0}" for row in range(101)]),
    "strata": listing_of(["a", "b"] * 40, strata=[f"{row % 2}{row % 8 < 3}" for row in range(80)]),
    "groups": skewed_groups(0, groups=90, classes=3, largest=15),
    "several classes": with_several_classes(0),
    "several classes in groups": with_several_classes(2, groups=80),
}
