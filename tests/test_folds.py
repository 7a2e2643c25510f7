"""Images cut into folds."""

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.splits import stratified_folds
from tests.listed import LISTINGS, SHARES, Division, classes, listing_of, refusal, require_apart


@pytest.mark.parametrize("listing", LISTINGS.values(), ids=LISTINGS.keys())
@pytest.mark.parametrize("folds", [2, 5])
def test_folds_test_every_image_once(listing, folds):
    tables = [Division(fold=f"{number} of {folds}").divide(listing) for number in range(1, folds + 1)]
    tested = [row for table in tables for row in table.rows("test").tolist()]
    assert sorted(tested) == list(range(len(listing.paths)))
    for table in tables:
        require_apart(table, ["val", "test"])
        assert table.split_is_ours
        assert classes(listing, table.rows("train")) == classes(listing, range(len(listing.paths)))
        assert abs(len(table.rows("test")) - len(listing.paths) / folds) <= 2
        assert abs(len(table.rows("val")) - 0.15 * len(listing.paths)) <= 4
        for name, count in table.counts("test").items():
            total = sum(name in listing.classes_of(row) for row in range(len(listing.paths)))
            assert abs(count - total / folds) <= 2
    assert Division(fold=f" 1  of {folds} ").divide(listing).splits == tables[0].splits
    assert Division(fold=f"1 of {folds}", seed=1).divide(listing).splits != tables[0].splits


def test_folds_of_many_small_classes_are_of_the_same_size():
    """Rounding class by class would give the first fold an image more of every class."""
    folds = stratified_folds([str(row % 50) for row in range(50 * 11)], folds=10, seed=0)
    assert np.bincount(folds).tolist() == [55] * 10


def test_folds_follow_the_seed_and_not_the_order_of_the_images():
    listing = listing_of("a" * 40 + "b" * 20)
    tested = [Division(fold="1 of 4", seed=seed).divide(listing).rows("test").tolist() for seed in range(5)]
    assert len({tuple(rows) for rows in tested}) == 5
    assert all(len({row % 4 for row in rows}) > 1 for rows in tested), "images in order of capture must not alternate"


def test_a_given_validation_split_is_kept_beside_folds():
    given = ["val"] * 12 + ["train"] * 20 + [None] * 28
    listing = listing_of("ab" * 30, given)
    tables = [Division(fold=f"{number} of 4").divide(listing) for number in range(1, 5)]
    for table in tables:
        assert table.rows("val").tolist() == list(range(12))
        assert [len(table.rows(split)) for split in ("train", "test")] == [36, 12]
    assert sorted(row for table in tables for row in table.rows("test").tolist()) == list(range(12, 60))


@pytest.mark.parametrize(
    ("fold", "text"),
    [
        ("2", "data.fold: expected 'i of k' such as '2 of 5', found '2'."),
        ("two of five", "expected 'i of k' such as '2 of 5', found 'two of five'"),
        ("1 of 5 of 5", "expected 'i of k'"),
        ("-1 of 5", "expected 'i of k'"),
        ("", "expected 'i of k'"),
        ("1 of 1", "data.fold: expected at least 2 folds, found '1 of 1'."),
        ("1 of 0", "at least 2 folds"),
        ("0 of 5", "data.fold: expected one of the folds 1 to 5, found '0 of 5'."),
        ("6 of 5", "one of the folds 1 to 5, found '6 of 5'"),
        ("1 of 9", "data.fold: expected at least 9 images of class 'b' to cut into 9 folds, found 8 in somewhere; use"),
        ("1 of 9", "use fewer folds, add images or remove the class."),
    ],
)
def test_folds_that_cannot_be_are_refused(fold, text):
    assert text in refusal(listing_of("aabb" * 4 + "a" * 4), fold=fold)


def test_what_two_folds_leave_must_train_and_validate():
    listing = listing_of("a" * 8 + "b" * 3)
    assert "at least 4 images of class 'b' to cut into 2 folds, found 3" in refusal(listing, fold="1 of 2")
    for number in (1, 2, 3):
        counts = [Division(fold=f"{number} of 3").divide(listing).counts(split)["b"] for split in SHARES]
        assert counts == [1, 1, 1]
    halves = listing_of("a" * 8 + "b" * 2 + "ab", ["train"] * 10 + ["val"] * 2)
    assert [Division(fold="1 of 2").divide(halves).counts(split)["b"] for split in SHARES] == [1, 1, 1]


def test_folds_of_too_few_groups_are_refused():
    listing = listing_of("ab" * 12, groups=[f"g{row // 8}" for row in range(24)])
    assert "at least 4 groups of class 'a' to cut into 4 folds, found 3" in refusal(listing, fold="1 of 4")
    rare = listing_of(["a|b", "a", "a", "b", "a|c"] + ["b"] * 9, separator="|")
    assert "at least 2 images of class 'c' to cut into 3 folds, found 1" in refusal(rare, fold="1 of 3")
    assert "at least 15 images to cut into 15 folds, found 14" in refusal(
        listing_of(["a|b"] * 14, separator="|"), fold="1 of 15"
    )


def test_a_fold_that_leaves_one_group_is_refused():
    """It could train or validate, not both."""
    listing = listing_of("ab" * 23, groups=["large"] * 40 + ["x", "x", "y", "y", "z", "z"])
    messages = []
    for number in (1, 2):
        try:
            assert set(Division(fold=f"{number} of 2").divide(listing).splits) == set(SHARES)
        except DataError as error:
            messages.append(str(error))
    (message,) = messages
    assert message.startswith("data.fold: expected enough groups to cut into 2 folds, found none that training could")
    assert message.endswith("spare for val without losing a class in somewhere; use fewer folds or add groups.")


def test_folds_and_given_splits_that_contradict_each_other_are_refused():
    listing = listing_of("ab" * 10, ["test"] * 4 + [None] * 16)
    assert "remove data.fold or the test split" in refusal(listing, fold="1 of 2")
    assert "found 4 test images" in refusal(listing, fold="1 of 2")
    crossing = listing_of("ab" * 10, ["val"] * 2 + [None] * 18, groups=["p1", "p2"] * 2 + [f"g{r}" for r in range(16)])
    assert "not in the given val split as well, found 2 ('p1', 'p2')" in refusal(crossing, fold="1 of 2")


def test_a_validation_share_that_folds_do_not_leave_is_refused():
    listing = listing_of("ab" * 10)
    message = refusal(listing, fold="1 of 2", val_fraction=0.5)
    assert message.startswith("data.val_fraction: expected less than 0.5, which data.fold '1 of 2' leaves, found 0.5")
    assert len(Division(fold="1 of 2", val_fraction=0.4).divide(listing).rows("val")) == 8
    with_val = listing_of("ab" * 10, ["val"] * 4 + [None] * 16)
    assert len(Division(fold="1 of 2", val_fraction=0.5).divide(with_val).rows("val")) == 4
