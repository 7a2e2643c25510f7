"""Suspected wrong labels, and files that tell the class."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from datamodules.audit.inspection import ImageFacts
from datamodules.audit.labels import judge_labels
from datamodules.audit.shortcuts import find_shortcut

NAMES = ("cat", "cow", "dog")


def features_of(classes, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = 3 * np.eye(3, 12)
    return (centres[classes] + spread * rng.normal(size=(len(classes), 12))).astype(np.float32)


def single(classes):
    return [(NAMES[code],) for code in classes]


TRUTH = np.repeat([0, 1, 2], 60)


def test_flipped_labels_come_first_with_the_right_suggestion():
    features = features_of(TRUTH, spread=0.7)
    flipped = np.random.default_rng(1).choice(180, 9, replace=False)
    given = TRUTH.copy()
    given[flipped] = (given[flipped] + 1) % 3
    judged = judge_labels(single(given), features, range(180))
    assert set(np.argsort(judged.scores)[:9]) == set(flipped)
    assert [suspect.score for suspect in judged.suspects] == sorted(suspect.score for suspect in judged.suspects)
    for suspect in judged.suspects[:9]:
        assert suspect.given == (NAMES[given[suspect.row]],)
        assert suspect.suggested == (NAMES[TRUTH[suspect.row]],)
        assert suspect.score == judged.scores[suspect.row]


def test_clean_labels_are_hardly_doubted():
    judged = judge_labels(single(TRUTH), features_of(TRUTH, spread=0.7), range(180))
    assert judged.suspects == []
    assert np.isfinite(judged.scores).all()


def test_scores_are_the_mean_of_regression_and_neighbours_on_other_folds():
    features = features_of(TRUTH, spread=2.5)
    own = np.zeros(180)
    for learn, judge in StratifiedGroupKFold(5, shuffle=True, random_state=3).split(features, TRUTH, np.arange(180)):
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        near = KNeighborsClassifier(10, metric="cosine")
        for model in (linear, near):
            model.fit(features[learn], TRUTH[learn])
            own[judge] += model.predict_proba(features[judge])[np.arange(len(judge)), TRUTH[judge]] / 2
    # Groups are numbered here as text is sorted.
    together = [f"{row:04}" for row in range(180)]
    assert judge_labels(single(TRUTH), features, together, seed=3).scores == pytest.approx(own, abs=1e-3)


def test_suspects_are_as_sure_of_the_other_class_as_its_own_images_are():
    classes = TRUTH[:120]
    scores = judge_labels(single(classes), features_of(classes, spread=2.5), range(120))
    usual = np.array([scores.scores[classes == code].mean() for code in (1, 0)])[classes]
    expected = np.flatnonzero((1 - scores.scores > scores.scores) & (1 - scores.scores >= usual))
    assert sorted(suspect.row for suspect in scores.suspects) == expected.tolist()
    assert 0 < len(expected) < (scores.scores < 0.5).sum()


def test_copies_do_not_vouch_for_each_other():
    features = features_of(TRUTH, spread=0.5)
    copies = np.arange(12)  # one picture, twelve times, with the wrong label
    features[copies] = features[0] + 0.001 * np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)
    given = TRUTH.copy()
    given[copies] = 2
    alone = judge_labels(single(given), features, range(180))
    as_one = judge_labels(single(given), features, ["copies" if row < 12 else row for row in range(180)])
    assert {suspect.row for suspect in as_one.suspects} >= set(range(12))
    assert as_one.scores[:12].max() < alone.scores[:12].min()


def test_classes_of_few_images_are_not_judged():
    classes = [*single(TRUTH), ("rare",), ("rare",)]
    judged = judge_labels(classes, np.concatenate([features_of(TRUTH), features_of([0, 1], seed=5)]), range(182))
    assert np.isnan(judged.scores[180:]).all()
    assert np.isfinite(judged.scores[:180]).all()
    assert all(suspect.row < 180 for suspect in judged.suspects)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_little_to_say_anything(count):
    judged = judge_labels(single(TRUTH[:count]), features_of(TRUTH[:count]), range(count))
    assert judged.suspects == []
    assert np.isnan(judged.scores).all()
    assert len(judged.scores) == count


def test_one_class_alone_and_one_group_alone_say_nothing():
    assert judge_labels(single(TRUTH[:60]), features_of(TRUTH[:60]), range(60)).suspects == []
    assert np.isnan(judge_labels(single(TRUTH), features_of(TRUTH), ["one"] * 180).scores).all()


def test_several_classes_an_image():
    rng = np.random.default_rng(0)
    present = rng.random((200, 3)) < 0.4
    features = np.concatenate([4 * present + rng.normal(size=(200, 3)), rng.normal(size=(200, 5))], 1).astype(
        np.float32
    )
    given = present.copy()
    given[11, 0] ^= True
    given[23, 2] ^= True
    labels = [tuple(name for name, there in zip(NAMES, line, strict=True) if there) for line in given]
    judged = judge_labels(labels, features, range(200), multi_label=True)
    assert {suspect.row for suspect in judged.suspects[:2]} == {11, 23}
    for suspect in judged.suspects[:2]:
        right = {name for name, there in zip(NAMES, present[suspect.row], strict=True) if there}
        assert set(suspect.suggested) == right
        assert suspect.given == labels[suspect.row]
    assert set(np.argsort(judged.scores)[:2]) == {11, 23}


def test_the_seed_decides_and_the_global_random_state_is_left_alone():
    features = features_of(TRUTH, spread=2.5)
    state = np.random.get_state()[1].tobytes()
    one, same, other = (judge_labels(single(TRUTH), features, range(180), seed=seed).scores for seed in (0, 0, 1))
    assert np.random.get_state()[1].tobytes() == state
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


# Shortcuts


def facts(count, **changes):
    base = {"width": 640, "height": 480, "format": "JPEG", "mode": "RGB", "bits": 8}
    return [ImageFacts(**{**base, **{key: value(row) for key, value in changes.items()}}) for row in range(count)]


CLASSES = ["cat" if row % 2 else "dog" for row in range(80)]


@pytest.mark.parametrize(
    ("changes", "properties"),
    [
        ({"format": lambda row: "PNG" if row % 2 else "JPEG"}, ("file format",)),
        ({"mode": lambda row: "L" if row % 2 else "RGB"}, ("colour mode",)),
        ({"bits": lambda row: 16 if row % 2 else 8}, ("bits",)),
        ({"height": lambda row: 300 + row % 7 + 200 * (row % 2)}, None),
    ],
)
def test_files_that_tell_the_class(changes, properties):
    found = find_shortcut(facts(80, **changes), CLASSES)
    assert found is not None
    assert found.accuracy == 1
    assert found.chance == 0.5
    assert found.properties == properties or (
        properties is None and found.properties[0] in ("height", "width to height")
    )


def test_files_that_tell_nothing():
    sizes = np.random.default_rng(0).integers(200, 900, 80)
    assert find_shortcut(facts(80), CLASSES) is None
    assert find_shortcut(facts(80, width=lambda row: int(sizes[row])), CLASSES) is None
    assert find_shortcut(facts(80, width=lambda row: row), ["cat"] * 80) is None
    assert find_shortcut([], []) is None


def test_rare_classes_that_stand_out_are_no_shortcut_for_the_others():
    classes = [*CLASSES, *np.repeat(["owl", "cow", "ant", "bee"], 4)]
    assert find_shortcut(facts(96, width=lambda row: 640 if row < 80 else 100 * (row // 4)), classes) is None
