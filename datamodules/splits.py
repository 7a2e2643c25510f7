"""Dividing images among training, validation and test."""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
#: What people call the splits, in lower case.
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

# What a split is charged for lacking a class that it must have, for lacking any image, and for lacking a class that it
# would better have. Beside these, an absent class costs a split less than 1.
_INCOMPLETE, _EMPTY, _LACKING = 1e9, 1e6, 1.0
# Passes over the groups, groups in a pass, exchanges tried in a pass (at least one a group).
_PASSES, _VISITS, _EXCHANGES = 5, 20_000, 1_000
# Starts, and what they share: a division of 100 groups is begun ten times, one of 1,000 once.
_STARTS, _STARTED_GROUPS = 16, 1_000
# Smaller differences of the loss are rounding.
_ROUNDING = 1e-9


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


def stratified_folds(strata: Sequence[object], folds: int, seed: int) -> NDArray[np.int64]:
    """Cut images into folds that differ by at most one image, in all and in every stratum.

    Args:
        strata: the stratum of each image.
        folds: how many, at least 2.
        seed: of the shuffle.

    Returns:
        The fold of each image, counted from 0.

    Example:
        >>> folds = stratified_folds(["a"] * 7 + ["b"] * 5, folds=3, seed=0)
        >>> np.bincount(folds).tolist(), sorted(np.bincount(folds[:7]).tolist())
        ([4, 4, 4], [2, 2, 3])
    """
    codes = np.unique([str(stratum) for stratum in strata], return_inverse=True)[1]
    shuffled = np.random.default_rng(seed).permutation(len(strata))
    by_stratum = shuffled[np.argsort(codes[shuffled], kind="stable")]
    dealt = np.empty(len(strata), dtype=np.int64)
    dealt[by_stratum] = np.arange(len(strata)) % folds
    return dealt


def grouped_split(
    groups: Sequence[Hashable],
    classes: Sequence[Collection[str]],
    fractions: dict[str, float],
    seed: int,
    *,
    strata: Sequence[str] | None = None,
    complete: str | None = None,
    kept: Collection[Hashable] = (),
) -> NDArray[np.str_]:
    """Assign whole groups of images to splits so that every class, and the images in all, are divided alike.

    The loss is the squared relative distance of a split from its share, weighted by the share and summed over splits,
    classes, strata and the images in all, and a charge for every class that a split lacks. Groups are placed one by
    one where the loss rises least, the rarest class first and large groups before small ones; then groups are moved
    and exchanged while that lowers it. With every image a group of its own this is, but for the exchanges, the
    iterative stratification of K. Sechidis, G. Tsoumakas and I. Vlahavas, "On the Stratification of Multi-Label
    Data", ECML PKDD 2011.

    Args:
        groups: the group of each image.
        classes: the classes of each image: one, none or several.
        fractions: share of each split, in (0, 1), summing to 1.
        seed: of the order in which groups are tried.
        strata: what else is divided alike, one for each image.
        complete: the split that has every class; a class in one group alone goes there.
        kept: groups that are in the first split, whatever the loss.

    Returns:
        The split's name for each image. A split is empty only where ``complete`` or ``kept`` leave nothing for it.

    Example:
        >>> groups = ["g1", "g1", "g2", "g2", "g3", "g3", "g4"]
        >>> classes = [("a",)] * 6 + [("b",)]
        >>> names = grouped_split(groups, classes, {"train": 0.7, "val": 0.3}, seed=0, complete="train")
        >>> names.tolist().count("val"), str(names[6])
        (2, 'train')
    """
    number: dict[Hashable, int] = {}
    unit_of = [number.setdefault(group, len(number)) for group in groups]
    units, kinds = _units(unit_of, classes, strata)
    fixed = {number[group] for group in kept if group in number}
    must = list(fractions).index(complete) if complete is not None else None
    rng = np.random.default_rng(seed)

    def attempt(start: int) -> _Parts:
        parts = _Parts(units, kinds, list(fractions.values()), must)
        parts.fill(fixed, start, rng)
        parts.improve(fixed, rng)
        return parts

    starts = max(1, min(_STARTS, _STARTED_GROUPS // max(1, len(units))))
    part_of = min(map(attempt, range(starts)), key=_Parts.loss).part_of
    return np.array(list(fractions))[[part_of[unit] for unit in unit_of]]


Unit = list[tuple[int, int]]


def _units(
    unit_of: list[int], classes: Sequence[Collection[str]], strata: Sequence[str] | None
) -> tuple[list[Unit], list[str]]:
    """What each unit holds, as (column, images), and what the columns count: ``class``, ``image`` or ``stratum``."""
    counts: list[Counter[tuple[str, str]]] = [Counter() for _ in range(max(unit_of, default=-1) + 1)]
    for row, unit in enumerate(unit_of):
        counts[unit].update([("image", ""), *(("class", name) for name in classes[row])])
        if strata is not None:
            counts[unit]["stratum", strata[row]] += 1
    traits = sorted(set().union(*counts))
    column = {trait: index for index, trait in enumerate(traits)}
    units = [sorted((column[trait], count) for trait, count in held.items()) for held in counts]
    return units, [kind for kind, _ in traits]


class _Parts:
    """Units (groups of images) in parts (splits), and what that costs.

    Sums run in plain Python, one after the other, so that every machine comes to the same result.
    """

    def __init__(self, units: list[Unit], kinds: list[str], shares: list[float], complete: int | None) -> None:
        counts: list[list[int]] = [[] for _ in kinds]
        for unit in units:
            for column, count in unit:
                counts[column].append(count)
        totals = [sum(of_column) for of_column in counts]
        self.units = units
        self.scales = [[1 / (share * total * total) for total in totals] for share in shares]
        self.have = [[0] * len(kinds) for _ in shares]
        self.part_of = [-1] * len(units)
        self.charges = [
            [_EMPTY if kind == "image" else _INCOMPLETE * (kind == "class" and part == complete) for kind in kinds]
            for part in range(len(shares))
        ]
        # Even the least that there is of a class may be far too much for a small share: that must not keep it out.
        least = [min(of_column) / total for of_column, total in zip(counts, totals, strict=True)]
        self.lacking = [
            [
                _LACKING + max(0.0, amount * amount / share - 2 * amount) if kind == "class" else 0.0
                for amount, kind in zip(least, kinds, strict=True)
            ]
            for share in shares
        ]

    def loss(self) -> float:
        """Sum of share * (have / (share * total) - 1)^2 and of the charges, less a constant."""
        return math.fsum(
            count * count * scale if count else charge
            for have, scales, charges in zip(self.have, self.scales, self.charges, strict=True)
            for count, scale, charge in zip(have, scales, charges, strict=True)
        )

    def cost(self, unit: int, part: int) -> float:
        """What the loss rises by, less a constant, when a unit that is in no part is put into one."""
        have, scales, charges = self.have[part], self.scales[part], self.charges[part]
        cost = 0.0
        for column, count in self.units[unit]:
            there = have[column]
            cost += count * (2 * there + count) * scales[column]
            if not there:
                cost -= charges[column]
        return cost

    def best(self, unit: int) -> int:
        """The part in which a unit that is in none costs least."""
        costs = [self.cost(unit, part) for part in range(len(self.have))]
        return costs.index(min(costs))

    def put(self, unit: int, part: int) -> None:
        have = self.have[part]
        for column, count in self.units[unit]:
            have[column] += count
        self.part_of[unit] = part

    def take(self, unit: int) -> int:
        """Take a unit out of its part, which is returned."""
        have = self.have[self.part_of[unit]]
        for column, count in self.units[unit]:
            have[column] -= count
        return self.part_of[unit]

    def fill(self, fixed: set[int], start: int, rng: np.random.Generator) -> None:
        """Put every unit into a part: those of the column in which fewest are waiting first, and large ones first.

        Units of about the same size are taken at random; what counts as the same grows from start to start.
        """
        sizes = np.array([max(count for _, count in unit) for unit in self.units], dtype=np.int64)
        order = np.argsort(-((sizes >> start) + 1) * rng.uniform(1, 2, len(sizes)), kind="stable").tolist()
        members: list[list[int]] = [[] for _ in self.have[0]]
        for unit in order:
            for column, _ in self.units[unit]:
                members[column].append(unit)
        waiting = np.array([len(units) for units in members])

        def settle(unit: int, part: int) -> None:
            self.put(unit, part)
            waiting[[column for column, _ in self.units[unit]]] -= 1

        for unit in fixed:
            settle(unit, 0)
        while waiting.any():
            rarest = int(np.where(waiting > 0, waiting, len(order) + 1).argmin())
            for unit in members[rarest]:
                if self.part_of[unit] < 0:
                    settle(unit, self.best(unit))

    def improve(self, fixed: set[int], rng: np.random.Generator) -> None:
        """Move and exchange units while that lowers the loss, of which classes that a part lacks are from now on."""
        self.charges = [list(map(max, *charges)) for charges in zip(self.charges, self.lacking, strict=True)]
        free = np.array([unit for unit in range(len(self.units)) if unit not in fixed])
        if free.size == 0:
            return
        partners_each = max(1, min(len(free), _EXCHANGES // len(free)))
        for _ in range(_PASSES):
            tried = rng.permutation(free)[:_VISITS]
            others = rng.choice(free, (len(tried), partners_each))
            changed = False
            for unit, partners in zip(tried.tolist(), others.tolist(), strict=True):
                changed |= self.move(unit)
                for other in partners:
                    changed |= self.exchange(unit, other)
            if not changed:
                break

    def move(self, unit: int) -> bool:
        """Put a unit where it costs least; whether that is another part."""
        here = self.take(unit)
        there = self.best(unit)
        better = self.cost(unit, there) < self.cost(unit, here) - _ROUNDING
        self.put(unit, there if better else here)
        return better

    def exchange(self, unit: int, other: int) -> bool:
        """Let two units change places if that lowers the loss; whether it did."""
        here, there = self.part_of[unit], self.part_of[other]
        if here == there:
            return False
        self.take(unit)
        self.take(other)
        cost = self.cost(unit, here) + self.cost(other, there)
        better = self.cost(unit, there) + self.cost(other, here) < cost - _ROUNDING
        self.put(unit, there if better else here)
        self.put(other, here if better else there)
        return better
