"""Groups that file names suggest."""

import re

import numpy as np
import pytest

from datamodules.audit.groups import crossing_groups, group_keys, suggest_groups

TOWNS = ("oslo", "rome", "bern", "kyiv")
DAYS = ("20210304", "20210305", "20210311", "20210402", "20210520")
CASES = {
    "slices of patients": (
        [f"{c}/patient_{p:03}_slice{s}.png" for c in "ab" for p in range(12) for s in range(4)],
        "patient_000",
    ),
    "any prefix": (
        [f"{c}/BloodImage_{p:05}_{s}.jpg" for c in "ab" for p in range(12) for s in range(4)],
        "BloodImage_00000",
    ),
    "photographs by day": (
        [f"{c}/IMG_{d}_1{n:05}.jpg" for c in "ab" for d in DAYS for n in range(0, 700, 90)],
        "IMG_20210304",
    ),
    "tiles": (
        [f"{c}/{t}_x{x}_y{y}.tif" for c in "ab" for t in TOWNS for x in range(3) for y in range(3)],
        "oslo",
    ),
    "tiles by numbers": (
        [f"{c}/scene{t}_{x}_{y}.tif" for c in "ab" for t in "klmnop" for x in (0, 256) for y in (0, 256)],
        "scenek",
    ),
    "folders": ([f"{c}/kitchen-{v}/{n:04}.jpg" for c in "ab" for v in "pqrst" for n in range(8)], "kitchen-p"),
    "numbered folders": ([f"{c}/video{v}/{n:04}.jpg" for c in "ab" for v in range(6) for n in range(8)], "video0"),
    "Roboflow": (
        [f"{c}/IMG_{n}_jpg.rf.{n * 7 + k:032x}.jpg" for c in "ab" for n in range(9) for k in range(3)],
        "IMG_0",
    ),
    "changed copies": (
        [f"{c}/pic{n:02}{s}.jpg" for c in "ab" for n in range(9) for s in ("", " (1)", "_flip", "_aug_3")],
        "pic00",
    ),
    "letters": ([f"{c}/{n:03}{s}.jpg" for c in "ab" for n in range(9) for s in "xyz"], "000"),
    "two numbers": ([f"{c}/p{n}s{s}.jpg" for c in "ab" for n in range(9) for s in range(3)], "p0"),
    "spaces": ([f"{c}/sea lion {n} - {s}.jpg" for c in "ab" for n in range(9) for s in range(3)], "sea lion 0"),
}


def labels_of(paths):
    return [path.split("/")[0] for path in paths]


def splits_of(paths):
    return [str(split) for split in np.random.default_rng(0).choice(["train", "val", "test"], len(paths))]


@pytest.mark.parametrize(("paths", "group"), CASES.values(), ids=CASES.keys())
def test_names_that_tell_groups(paths, group):
    suggestions = suggest_groups(paths, labels_of(paths), splits_of(paths))
    keys = [group_keys(paths, suggestion.pattern) for suggestion in suggestions]
    expected = [suggestion for suggestion, key in zip(suggestions, keys, strict=True) if key[0].strip(" -") == group]
    assert expected, suggestions
    chosen = expected[0]
    chosen_keys = group_keys(paths, chosen.pattern)
    assert len(set(chosen_keys)) == chosen.groups
    sizes = [chosen_keys.count(key) for key in set(chosen_keys)]
    assert (min(sizes), max(sizes)) == (chosen.smallest, chosen.largest)
    assert chosen.together == sum(size for size in sizes if size > 1)
    assert chosen.example[1] in chosen.example[0]
    crossing = {
        key
        for key in chosen_keys
        if len({s for k, s in zip(chosen_keys, splits_of(paths), strict=True) if k == key}) > 1
    }
    assert chosen.crossing == len(crossing) == len(crossing_groups(chosen_keys, splits_of(paths)))
    assert chosen == suggestions[0] or group in ("oslo", "scenek")


NOTHING = {
    "class and number": [f"{c}/{c}{n}.jpg" for c in ("glass", "metal", "paper", "trash") for n in range(40)],
    "class, line, number": [f"{c}/{c}_{n:04}.jpg" for c in ("cat", "dog", "owl", "cow", "ant") for n in range(40)],
    "number and class": [f"{c}/{n:03}_{c}.jpg" for c in ("cat", "dog", "owl") for n in range(40)],
    "numbers": [f"{c}/{n:03}.jpg" for c in "abc" for n in range(40)],
    "camera numbers": [f"{c}/DSC{n + 100 * k:05}.JPG" for k, c in enumerate("abc") for n in range(40)],
    "one film": [f"{c}/vid12_frame_{n}.jpg" for c in "ab" for n in range(40)],
    "random names": [f"{c}/{v:016x}.jpg" for c in "ab" for v in np.random.default_rng(0).integers(0, 2**62, 40)],
    "split folders": [f"{s}/{c}/{n}.jpg" for s in ("train", "val", "test") for c in ("cat", "dog") for n in range(20)],
    "one group and a few": [
        *(f"{c}/main-set {n}.jpg" for c in "ab" for n in range(40)),
        *(f"a/extra{k}-set {n}.jpg" for k in "pqrst" for n in range(8)),
    ],
    "two images": ["a/1_1.jpg", "a/1_2.jpg"],
}


@pytest.mark.parametrize("paths", NOTHING.values(), ids=NOTHING.keys())
def test_names_that_tell_nothing(paths):
    labels = [path.split("/")[-2] for path in paths]
    assert suggest_groups(paths, labels, splits_of(paths)) == []


def test_pictures_decide_whether_groups_mean_anything():
    paths, _ = CASES["any prefix"]
    rng = np.random.default_rng(0)
    of_group = {key: rng.normal(size=4) for key in sorted(set(group_keys(paths, r"(?P<group>Image_\d+)")))}
    alike = np.stack([of_group[re.search(r"Image_\d+", path)[0]] for path in paths]) + 0.1 * rng.normal(
        size=(len(paths), 4)
    )
    found = suggest_groups(paths, labels_of(paths), splits_of(paths), alike.astype(np.float32))
    assert found[0].alike > 0.9
    unlike = rng.normal(size=(len(paths), 4)).astype(np.float32)
    assert suggest_groups(paths, labels_of(paths), splits_of(paths), unlike) == []


def test_a_suggestion_has_no_rival_that_makes_the_same_groups():
    for paths, _ in CASES.values():
        suggestions = suggest_groups(paths, labels_of(paths), splits_of(paths))
        parts = [tuple(dict.fromkeys(group_keys(paths, s.pattern)).keys()) for s in suggestions]
        partitions = {
            tuple(np.unique(group_keys(paths, s.pattern), return_inverse=True)[1].tolist()) for s in suggestions
        }
        assert len(partitions) == len(parts)


def test_crossing_groups_are_counted_the_largest_first():
    groups = ["a", "b", "a", "b", "b", "c", "", ""]  # without a group, an image is on its own
    found = crossing_groups(groups, ["train", "train", "val", "test", "train", "val", "train", "test"])
    assert list(found) == ["b", "a"]
    assert found["b"] == {"train": 2, "test": 1}
