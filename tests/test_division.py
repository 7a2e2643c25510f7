"""How images are divided: by class, by group, and where they have several classes."""

import itertools
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from datamodules.division import group_keys
from datamodules.splits import grouped_split, stratified_split
from datamodules.table import ImageTable, Listing
from tests.listed import (
    SHARES,
    Division,
    classes,
    distance,
    listing_of,
    refusal,
    require_apart,
    skewed_groups,
    units,
    with_several_classes,
)

# Images with one class that stand alone


def test_plain_images_are_divided_as_they_always_were():
    """A checkpoint of an earlier release can still be tested: its digest holds the split."""
    letters = {"train": "r", "val": "a", "test": "e"}
    labels = ["a"] * 13 + ["b"] * 8 + ["c"] * 4
    table = Division(seed=7).divide(listing_of(labels))
    assert "".join(letters[split] for split in table.splits) == "rrarrerrrereararrreerrear"
    assert table.split_is_ours
    given = ["test"] * 3 + [None] * 22
    rest = stratified_split(labels[3:], {"train": 0.85, "val": 0.15}, seed=7)
    assert Division(seed=7).divide(listing_of(labels, given)).splits == ["test"] * 3 + rest.tolist()


def test_strata_stand_in_for_labels():
    labels = ["a", "b"] * 40
    strata = [f"{label} {row % 4 < 2}" for row, label in enumerate(labels)]
    table = Division().divide(listing_of(labels, strata=strata))
    found = Counter((strata[row], split) for row, split in enumerate(table.splits))
    assert {split: {found[stratum, split] for stratum in set(strata)} for split in SHARES} == {
        "train": {13},
        "val": {3},
        "test": {4},
    }


@pytest.mark.parametrize(
    ("given", "drawn", "ours"),
    [
        (["train", "val", "test", None], [], False),
        (["train", "val", None, None], ["test"], True),
        ([None, "test", None, "test"], ["val"], True),
        (["train", None, "train", None], ["val", "test"], True),
    ],
)
def test_given_splits_are_kept_and_images_without_one_are_for_training(given, drawn, ours):
    listing = listing_of(["a", "b"] * 40, [split for split in given for _ in range(20)])
    table = Division().divide(listing)
    assert table.split_is_ours is ours
    for split, before in zip(table.splits, listing.given, strict=True):
        assert split == before or (before in (None, "train") and split in {"train", *drawn})
    assert set(table.splits) == set(SHARES)
    if not ours:
        assert table.splits == ["train" if split is None else split for split in listing.given]


def test_nothing_need_be_held_out_for_validation():
    table = Division(val_fraction=0, test_fraction=0.4).divide(listing_of("aaaaabbbbb"))
    assert [sum(table.counts(split).values()) for split in ("train", "val", "test")] == [6, 0, 4]
    table = Division(val_fraction=0, fold="2 of 5").divide(listing_of("aaaaabbbbb"))
    assert [sum(table.counts(split).values()) for split in ("train", "val", "test")] == [8, 0, 2]


@pytest.mark.parametrize(
    ("settings", "labels", "given", "text"),
    [
        (
            {},
            "aaaaabb",
            None,
            "data.root: expected at least 3 images of class 'b' to divide among train, val and test, ",
        ),
        ({}, "aaaaabb", None, "found 2 in somewhere; add images, remove the class or set data.val_fraction to 0."),
        (
            {},
            "aaaab",
            ["test", None, None, None, None],
            "at least 2 images of class 'b' to divide among train and val,",
        ),
        ({}, "aabb", ["val", "val", "test", "test"], "data.root: expected images to train on in somewhere, found none"),
        ({"val_fraction": 1.0}, "aaabbb", None, "data.val_fraction: expected a share from 0 to below 1, found 1.0."),
        ({"test_fraction": 1.0}, "aaabbb", None, "data.test_fraction: expected a share between 0 and 1, found 1.0."),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "aaabbb", None, "expected a sum below 1, found 1.1; lower one."),
    ],
)
def test_what_cannot_be_divided_is_refused(settings, labels, given, text):
    assert text in refusal(listing_of(labels, given), **settings)


def test_fractions_of_splits_that_are_not_drawn_need_not_leave_room():
    listing = listing_of("ab" * 10, ["test"] * 4 + [None] * 16)
    table = Division(val_fraction=0.5, test_fraction=0.6).divide(listing)
    assert len(table.rows("val")) == len(table.rows("train")) == 8


def test_strata_that_would_leave_a_class_out_of_training_are_refused():
    listing = listing_of("aaaaaabbb", strata=["x"] * 6 + ["y0", "y1", "y2"])
    assert Division().divide(listing).counts("train")["b"] == 3
    crowded = listing_of("aaaaaabbb", strata=[str(row % 3) for row in range(9)])
    settings = {"val_fraction": 0.4, "test_fraction": 0.4}
    assert "enough images of class 'b' to divide among train, val and test, found none left for training" in refusal(
        crowded, **settings, seed=7
    )


# Groups


@pytest.mark.parametrize("seed", range(25))
def test_groups_stay_together_and_training_has_every_class(seed):
    listing = skewed_groups(seed, groups=12 + 4 * seed, classes=2 + seed % 6)
    table = Division(seed=seed).divide(listing)
    require_apart(table, ["val", "test"])
    assert set(table.splits) == set(SHARES)
    assert classes(listing, table.rows("train")) == set(listing.labels)
    assert table.split_is_ours
    np.random.seed(seed)
    state = np.random.get_state()[1].tolist()
    assert Division(seed=seed).divide(listing).splits == table.splits
    assert np.random.get_state()[1].tolist() == state


def test_seeds_make_different_divisions_of_groups():
    for groups in (30, 100, 2_000):
        listing = skewed_groups(3, groups, classes=4, largest=20)
        assert len({tuple(Division(seed=seed).divide(listing).splits) for seed in range(5)}) >= 4


@pytest.mark.parametrize("seed", range(8))
def test_many_small_groups_are_divided_by_the_shares(seed):
    listing = skewed_groups(seed, groups=400, classes=5, largest=6)
    table = Division(seed=seed).divide(listing)
    for name, total in Counter(listing.labels).items():
        for split, share in SHARES.items():
            assert abs(table.counts(split)[name] - share * total) <= 2
    for split, share in SHARES.items():
        assert abs(len(table.rows(split)) - share * len(listing.paths)) <= 4


@pytest.mark.parametrize("seed", range(5))
def test_images_in_groups_of_their_own_are_divided_as_if_there_were_no_groups(seed):
    rng = np.random.default_rng(seed)
    labels = [f"c{label}" for label in rng.choice(6, 400, p=[0.5, 0.25, 0.1, 0.08, 0.05, 0.02])]
    blank = Division(seed=seed).divide(listing_of(labels, groups=["", " "] * 200))
    named = Division(seed=seed).divide(listing_of(labels, groups=[f"g{row}" for row in range(400)]))
    assert blank.splits == named.splits, "a blank cell is a group of its own"
    for name, total in Counter(labels).items():
        for split, share in SHARES.items():
            assert abs(blank.counts(split)[name] - share * total) <= 1


def test_many_skewed_groups_are_divided_closely():
    """Placed in another order than rarest class and largest group first, they end a third and more further away."""
    found = [distance(Division(seed=1).divide(skewed_groups(seed, 1_500, 40, 0.6, largest=200))) for seed in (0, 1)]
    assert np.mean(found) < 0.02


def best_of_all(units_by_class: np.ndarray) -> tuple[int, int, float]:
    """The least loss over all divisions of a few groups, by trying every one."""
    return min(
        loss_of(units_by_class, np.array(parts)) for parts in itertools.product(range(3), repeat=len(units_by_class))
    )


def loss_of(units_by_class: np.ndarray, parts: np.ndarray) -> tuple[int, int, float]:
    """Classes that training lacks, empty splits, and the loss as the docstring has it."""
    counts = np.column_stack([units_by_class, units_by_class.sum(axis=1)])
    have = np.array([counts[parts == part].sum(axis=0) for part in range(3)])
    shares = np.array(list(SHARES.values()))[:, None]
    spread = (shares * (have / (shares * counts.sum(axis=0)) - 1) ** 2).sum()
    absent = have[:, :-1] == 0
    return int(absent[0].sum()), int((have[:, -1] == 0).sum()), float(absent[1:].sum() + spread)


def test_few_groups_are_divided_about_as_well_as_they_can_be():
    excess = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        table = rng.poisson(rng.choice([0.3, 0.7, 2]), (rng.integers(3, 7), rng.integers(1, 5)))
        table = table[:, table.any(axis=0)] * rng.integers(1, rng.choice([2, 10]), (len(table), 1))
        table = table[table.any(axis=1)]
        if len(table) < 3:
            continue
        cells = [(unit, name) for unit, name in np.ndindex(*table.shape) for _ in range(table[unit, name])]
        drawn = grouped_split([u for u, _ in cells], [(f"c{n}",) for _, n in cells], SHARES, seed, complete="train")
        split_of = dict(zip((unit for unit, _ in cells), drawn.tolist(), strict=True))
        found = loss_of(table, np.array([list(SHARES).index(split_of[unit]) for unit in range(len(table))]))
        best = best_of_all(table)
        assert found[:2] == best[:2], "a class is missing from training, or a split is empty, that need not be"
        excess.append(found[2] - best[2])
    assert len(excess) > 40
    assert np.median(excess) < 1e-9
    assert np.mean(excess) < 0.05


def spread_over_folds(listing: Listing, folds: np.ndarray) -> float:
    """Standard deviation over folds of a class's share, averaged over classes: what scikit-learn lessens."""
    labels = np.array(listing.labels)
    counts = np.array([[(labels[folds == fold] == name).sum() for fold in range(5)] for name in np.unique(labels)])
    return float((counts / counts.sum(axis=1, keepdims=True)).std(axis=1).mean())


def test_folds_of_groups_are_no_worse_than_those_of_scikit_learn():
    ratios = []
    for seed in range(12):
        listing = skewed_groups(seed, groups=60, classes=4, purity=0.5)
        theirs, ours = np.empty(len(listing.paths), dtype=int), np.empty(len(listing.paths), dtype=int)
        reference = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        for fold, (_, rows) in enumerate(reference.split(listing.labels, listing.labels, units(listing))):
            theirs[rows] = fold
        names = {str(fold): 0.2 for fold in range(5)}
        drawn = grouped_split(units(listing), [(label,) for label in listing.labels], names, seed)
        ours[:] = drawn.astype(int)
        ratios.append(spread_over_folds(listing, ours) / spread_over_folds(listing, theirs))
    assert np.mean(ratios) < 0.9
    assert max(ratios) < 1.1


def test_a_class_in_one_group_is_trained_on():
    labels = ["a"] * 30 + ["rare"] * 30 + ["single"]
    groups = [f"g{row // 3}" for row in range(30)] + ["one"] * 30 + ["alone"]
    for seed in range(10):
        table = Division(seed=seed, val_fraction=0.3, test_fraction=0.6).divide(listing_of(labels, groups=groups))
        assert table.counts("train")["rare"] == 30
        assert table.counts("train")["single"] == 1
        assert set(table.splits) == set(SHARES)


def test_a_class_in_three_groups_reaches_every_split():
    labels = ["a"] * 200 + ["rare"] * 3
    groups = [f"g{row // 2}" for row in range(200)] + ["x", "y", "z"]
    table = Division(val_fraction=0.02, test_fraction=0.02).divide(listing_of(labels, groups=groups))
    assert [table.counts(split)["rare"] for split in SHARES] == [1, 1, 1]


def test_strata_are_divided_beside_classes():
    rng = np.random.default_rng(0)
    groups = [f"g{row // 3}" for row in range(600)]
    labels = [f"c{label}" for label in rng.integers(2, size=600)]
    strata = [f"s{(row // 3) % 5}" for row in range(600)]
    table = Division().divide(listing_of(labels, groups=groups, strata=strata))
    for column in (labels, strata):
        for name, total in Counter(column).items():
            for split, share in SHARES.items():
                assert abs(sum(column[row] == name for row in table.rows(split)) - share * total) <= 3
    by_group = listing_of(labels, groups=groups, strata=groups)
    assert set(Division().divide(by_group).splits) == set(SHARES), "strata must not bind every group to training"


@pytest.mark.parametrize(
    ("labels", "groups", "given", "text"),
    [
        ("ab" * 4, ["x", "y"] * 4, None, "at least 3 groups to divide among train, val and test, found 2 in somewhere"),
        ("ab" * 4, ["x"] * 8, ["test"] * 2 + [None] * 6, "at least 1 group that is in no given split to divide"),
        (
            "abc",
            ["x", "y", "z"],
            None,
            "enough groups to divide among train, val and test, found none that training could spare for val",
        ),
    ],
)
def test_groups_that_cannot_be_divided_are_refused(labels, groups, given, text):
    assert text in refusal(listing_of(labels, given, groups=groups))
    assert "add groups" in refusal(listing_of(labels, given, groups=groups))


# Groups read off the names


def test_groups_are_read_off_paths():
    paths = [f"{name}/patient_{row // 4}_{row}.png" for name in "ab" for row in range(80)]
    listing = listing_of(["a"] * 80 + ["b"] * 80, paths=paths)
    table = Division(group_pattern=r"patient_\d+").divide(listing)
    assert table.listing.groups == [f"patient_{row // 4}" for _ in "ab" for row in range(80)]
    require_apart(table, SHARES)
    assert Division(group_pattern=r"patient_\d+", fold="1 of 4").divide(listing).listing.groups is not None


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        ("p[0-9]", ["p1", "p1", "x/other.png"]),
        ("/(p[0-9])_(s)", ["p1", "p1", "x/other.png"]),
        ("(y)/(?P<group>.)", ["x/p1_s1.png", "p", "x/other.png"]),
        ("(z)?p1", ["x/p1_s1.png", "y/p1_s2.png", "x/other.png"]),
    ],
)
def test_a_pattern_says_which_part_is_the_group(pattern, groups):
    assert group_keys(["x/p1_s1.png", "y/p1_s2.png", "x/other.png"], pattern) == groups


@pytest.mark.parametrize(
    ("pattern", "groups", "text"),
    [
        ("(", None, "data.group_pattern: expected a regular expression, found '(' (missing ), unterminated"),
        ("patient", None, "found in paths such as '000000.png', found 'patient' in none of 20"),
        ("0+", ["g"] * 20, "expected data that names no groups itself, found groups in somewhere"),
    ],
)
def test_a_pattern_that_gives_no_groups_is_refused(pattern, groups, text):
    assert text in refusal(listing_of("ab" * 10, groups=groups), group_pattern=pattern)


@pytest.mark.parametrize("seed", range(10))
def test_drawn_splits_share_no_group_with_given_ones(seed):
    listing = skewed_groups(seed, groups=60, classes=3)
    rng = np.random.default_rng(seed)
    given: list[str | None] = ["test" if rng.random() < 0.1 else None for _ in listing.paths]
    listing = replace(listing, given=given)
    table = Division(seed=seed).divide(listing)
    require_apart(table, ["val"])
    assert [split == "test" for split in table.splits] == [split == "test" for split in given]
    names = units(listing)
    crossing = {names[row] for row in table.rows("test")} & {names[row] for row in table.rows("train")}
    assert crossing, "these are left alone"


def test_groups_that_stay_in_training_count_towards_its_share():
    # Of 100 undivided images 60 are in a group that tests already: 40 can validate, and 15 do.
    groups = ["tested"] * 61 + [f"g{row}" for row in range(40)]
    listing = listing_of("ab" * 50 + "a", ["test"] + [None] * 100, groups=groups)
    assert len(Division().divide(listing).rows("val")) == 15


def test_a_large_listing_is_divided_in_seconds():
    rng = np.random.default_rng(0)
    groups = [f"g{group}" for group in rng.integers(20_000, size=200_000)]
    labels = [f"c{label}" for label in np.minimum(rng.zipf(1.3, size=200_000), 500)]
    listing = listing_of(labels, groups=groups)
    begin = time.process_time()
    table = Division().divide(listing)
    assert time.process_time() - begin < 20
    require_apart(table, ["val", "test"])
    assert distance(table) <= 1.05 * distance(Division().divide(replace(listing, groups=None)))


# Several classes an image


def sechidis(listing: Listing, seed: int) -> list[str]:
    """Algorithm 1 of Sechidis et al. 2011, written down from the paper."""
    rng = np.random.default_rng(seed)
    wanted = {split: share * len(listing.paths) for split, share in SHARES.items()}
    has = {row: set(listing.classes_of(row)) for row in range(len(listing.paths))}
    totals = Counter(name for names in has.values() for name in names)
    wanted_of = {name: {split: share * total for split, share in SHARES.items()} for name, total in totals.items()}
    splits = [""] * len(has)

    def assign(row: int, split: str) -> None:
        splits[row] = split
        wanted[split] -= 1
        for name in has.pop(row):
            wanted_of[name][split] -= 1

    while left := Counter(name for names in has.values() for name in names):
        rarest = min(left, key=lambda name: (left[name], name))
        for row in [row for row, names in has.items() if rarest in names]:
            assign(row, max(SHARES, key=lambda s: (wanted_of[rarest][s], wanted[s], rng.random())))
    for row in list(has):
        assign(row, max(SHARES, key=lambda s: (wanted[s], rng.random())))
    return splits


@pytest.mark.parametrize("seed", range(6))
def test_images_of_several_classes_are_divided_no_worse_than_by_iterative_stratification(seed):
    listing = with_several_classes(seed)
    assert "" in listing.labels
    table = Division(seed=seed).divide(listing)
    assert distance(table) <= distance(ImageTable(listing, sechidis(listing, seed), split_is_ours=True)) + 1e-9
    for split, share in SHARES.items():
        assert abs(len(table.rows(split)) - share * len(listing.paths)) <= 2
        for name in classes(listing, range(len(listing.paths))):
            total = sum(name in listing.classes_of(row) for row in range(len(listing.paths)))
            assert abs(table.counts(split)[name] - share * total) <= 1.5


def test_images_of_several_classes_in_groups_stay_together():
    listing = with_several_classes(1, images=500, groups=90)
    table = Division().divide(listing)
    require_apart(table, ["val", "test"])
    assert distance(table) < 0.02


def test_a_class_of_one_image_among_several_is_trained_on():
    listing = listing_of(["a|b", "b", "", "a", "a", "b|once", "", ""], separator="|")
    for seed in range(20):
        table = Division(seed=seed).divide(listing)
        assert table.counts("train")["once"] == 1
        assert set(table.splits) == set(SHARES)


def test_too_few_images_of_several_classes_are_refused():
    assert "at least 3 images to divide among train, val and test, found 2" in refusal(listing_of("ab", separator="|"))
    everything = listing_of(["a", "b", "c"], separator="|")
    assert (
        "expected enough images to divide among train, val and test, found none that training could spare"
        in refusal(everything)
    )
