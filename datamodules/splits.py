"""Dividing images among training, validation and test."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")


def stratified_split(strata: Sequence[object], fractions: dict[str, float], seed: int) -> NDArray[np.str_]:
    """Assign each image to a split so that every stratum is divided alike.

    Within a stratum the images are shuffled and dealt out by largest remainder; a stratum with at least as many
    images as there are splits gives every split at least one.

    Args:
        strata: the stratum of each image (its label, or label and more).
        fractions: share of each split, in (0, 1), summing to 1.
        seed: of the shuffle.

    Returns:
        The split's name for each image.

    Example:
        >>> names = stratified_split(["a"] * 8 + ["b"] * 4, {"train": 0.5, "val": 0.25, "test": 0.25}, seed=0)
        >>> [list(names[:8]).count(split) for split in ("train", "val", "test")]
        [4, 2, 2]
    """
    names = np.array(list(fractions))
    assigned = np.empty(len(strata), dtype=names.dtype)
    codes = np.unique([str(stratum) for stratum in strata], return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    for code in range(codes.max(initial=-1) + 1):
        members = rng.permutation(np.flatnonzero(codes == code))
        counts = _largest_remainder(len(members), np.array(list(fractions.values())))
        assigned[members] = np.repeat(names, counts)
    return assigned


def _largest_remainder(total: int, fractions: NDArray[np.float64]) -> NDArray[np.int64]:
    exact = total * fractions
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - counts), kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    if total >= len(counts):
        while (counts == 0).any():  # the largest split gives to an empty one
            counts[counts.argmax()] -= 1
            counts[counts.argmin()] += 1
    return counts
