"""Metrics against scikit-learn, and what their intervals are worth."""

import json
import math
import time

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, f1_score, log_loss

from pipeline.evaluation import metrics
from pipeline.evaluation.figures import confusion_figure, presence_figure
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.validation import validation_metrics
from pipeline.outcome import Evaluated


def random_predictions(seed: int, images: int, classes: int, skill: float = 2.0) -> Predictions:
    rng = np.random.default_rng(seed)
    targets = rng.choice(classes, images, p=rng.dirichlet(np.ones(classes)))
    logits = rng.normal(size=(images, classes))
    logits[np.arange(images), targets] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Predictions(targets, probabilities)


def random_presences(seed: int, images: int, classes: int, decimals: int = 8) -> Predictions:
    """Of several classes an image; with few decimals, many probabilities are equal."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((images, classes)) < rng.uniform(0.05, 0.5, classes)).astype(np.int64)
    logits = rng.normal(size=(images, classes)) + 2 * targets - 1
    return Predictions(targets, (1 / (1 + np.exp(-logits))).round(decimals), multi_label=True)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_agree_with_scikit_learn(seed: int) -> None:
    made = random_predictions(seed, images=200, classes=5)
    targets, probabilities = made.targets, made.probabilities
    assert metrics.accuracy(made) == pytest.approx(accuracy_score(targets, made.labels))
    assert metrics.macro_f1(made) == pytest.approx(f1_score(targets, made.labels, average="macro"))
    assert metrics.log_loss(made) == pytest.approx(log_loss(targets, probabilities, labels=list(range(5))))
    ours = metrics.confusion_matrix(targets, made.labels, 5)
    np.testing.assert_array_equal(ours, confusion_matrix(targets, made.labels, labels=list(range(5))))


def test_a_class_neither_present_nor_predicted_does_not_count() -> None:
    targets = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1]])
    made = Predictions(targets, probabilities)
    assert metrics.macro_f1(made) == pytest.approx(f1_score(targets, probabilities.argmax(axis=1), average="macro"))


def test_one_certain_mistake_stays_finite() -> None:
    assert np.isfinite(metrics.log_loss(Predictions(np.array([0]), np.array([[0.0, 1.0]]))))


def test_intervals_are_seeded_and_hold_the_value() -> None:
    made = random_predictions(1, images=300, classes=3)
    first, again = metrics.estimate_metrics(made), metrics.estimate_metrics(made)
    other = metrics.estimate_metrics(made, seed=1)
    assert first == again
    assert first["accuracy"].low != other["accuracy"].low or first["accuracy"].high != other["accuracy"].high
    for estimate in first.values():
        assert estimate.low < estimate.value < estimate.high
        assert estimate.n == 300


def test_a_95_percent_interval_covers_the_truth_about_that_often() -> None:
    # 200 samples of 150 images from a population whose accuracy is known.
    population = random_predictions(7, images=100_000, classes=3, skill=1.0)
    truth = metrics.accuracy(population)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        chosen = rng.integers(0, 100_000, 150)
        sample = Predictions(population.targets[chosen], population.probabilities[chosen])
        estimate = metrics.estimate_metrics(sample, resamples=200)["accuracy"]
        covered += estimate.low <= truth <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


# Several classes an image


@pytest.mark.parametrize("decimals", [8, 1])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_several_classes_agree_with_scikit_learn(seed: int, decimals: int) -> None:
    made = random_presences(seed, images=150, classes=6, decimals=decimals)
    targets, probabilities = made.targets, made.probabilities
    assert metrics.accuracy(made) == pytest.approx(accuracy_score(targets, made.labels))
    assert metrics.macro_f1(made) == pytest.approx(f1_score(targets, made.labels, average="macro"))
    by_class = [log_loss(targets[:, i], probabilities[:, i], labels=[0, 1]) for i in range(6)]
    assert metrics.log_loss(made) == pytest.approx(np.mean(by_class))
    expected = average_precision_score(targets, probabilities, average="macro")
    assert metrics.mean_average_precision(made) == pytest.approx(expected)


@pytest.mark.parametrize("decimals", [8, 1])
@pytest.mark.parametrize("multi_label", [False, True])
def test_a_weight_counts_an_image_so_many_times(multi_label: bool, decimals: int) -> None:
    made = random_presences(0, 120, 4, decimals) if multi_label else random_predictions(0, 120, 4)
    times = np.random.default_rng(1).integers(0, 4, 120)
    copied = Predictions(made.targets.repeat(times, axis=0), made.probabilities.repeat(times, axis=0), multi_label)
    for name, metric in (metrics.MULTI_LABEL_METRICS if multi_label else metrics.METRICS).items():
        assert metric(made, times) == pytest.approx(metric(copied, None), abs=1e-12), name
        assert metric(made, times) != pytest.approx(metric(made, None), abs=1e-4), name


def test_a_class_that_no_image_has_is_left_out_of_the_average_precision() -> None:
    made = random_presences(0, 60, 4)
    made.targets[:, 2] = 0
    others = [0, 1, 3]
    expected = average_precision_score(made.targets[:, others], made.probabilities[:, others], average="macro")
    assert metrics.mean_average_precision(made) == pytest.approx(expected)
    # It is predicted, though, and each time wrongly.
    expected = f1_score(made.targets, made.labels, average="macro", zero_division=np.nan)
    assert made.labels[:, 2].any()
    assert metrics.macro_f1(made) == pytest.approx(expected)
    made.probabilities[:, 2] = 0.1
    quiet = Predictions(made.targets, made.probabilities, multi_label=True)
    expected = f1_score(made.targets[:, others], made.labels[:, others], average="macro")
    assert metrics.macro_f1(quiet) == pytest.approx(expected)


def test_images_without_any_class_have_finite_metrics() -> None:
    made = Predictions(np.zeros((5, 3), np.int64), np.full((5, 3), 0.2), multi_label=True)
    found = {name: estimate.value for name, estimate in metrics.estimate_metrics(made, resamples=20).items()}
    assert found == pytest.approx(
        {"accuracy": 1.0, "macro_f1": 1.0, "log_loss": -np.log(0.8), "mean_average_precision": 0.0}
    )


def test_one_half_is_present() -> None:
    assert Predictions(np.array([[1, 0]]), np.array([[0.5, 0.49999]]), multi_label=True).labels.tolist() == [[1, 0]]


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_validations_of_a_training_have_the_same_metrics(multi_label: bool) -> None:
    made = random_presences(3, 100, 5, decimals=1) if multi_label else random_predictions(3, 100, 5)
    if multi_label:
        made.targets[:, 1], made.probabilities[:, 1] = 0, 0.1
    running = validation_metrics(5, multi_label)
    for epoch in (0, 1):
        for part in np.array_split(np.arange(100), 7):
            targets = torch.from_numpy(made.targets[part])
            probabilities = torch.from_numpy(made.probabilities[part]).float()
            running.update(probabilities, targets.float() if multi_label else targets)
        found = {name: float(value) for name, value in running.compute().items()}
        known = metrics.MULTI_LABEL_METRICS if multi_label else metrics.METRICS
        expected = {f"val/{name}": metric(made, None) for name, metric in known.items() if name != "log_loss"}
        assert found == pytest.approx(expected, abs=1e-6), epoch
        running.reset()


# Intervals over groups


def grouped(seed: int, groups: int, size: int) -> tuple[Predictions, list[str]]:
    """Images of a group are all right or all wrong, by chance."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, groups).repeat(size)
    right = (rng.random(groups) < 0.7).repeat(size)
    probabilities = np.where((targets == right)[:, None], [0.2, 0.8], [0.8, 0.2])
    return Predictions(targets, probabilities), [f"g{i}" for i in range(groups) for _ in range(size)]


def test_images_of_a_group_that_agree_make_intervals_wider() -> None:
    made, groups = grouped(0, groups=40, size=9)
    plain, over_groups = metrics.estimate_metrics(made), metrics.estimate_metrics(made, groups)
    for name, estimate in over_groups.items():
        assert estimate.value == plain[name].value
        assert estimate.n == 360
        # 9 images tell no more than one: the interval is 3 times as wide.
        ratio = (estimate.high - estimate.low) / (plain[name].high - plain[name].low)
        assert ratio == pytest.approx(3, rel=0.15), name


def test_intervals_over_groups_are_those_of_the_groups_means() -> None:
    made, groups = grouped(1, groups=50, size=4)
    means = made.right.reshape(50, 4).mean(axis=1)
    rng = np.random.default_rng(5)
    resampled = [means[rng.integers(0, 50, 50)].mean() for _ in range(2000)]
    estimate = metrics.estimate_metrics(made, groups, seed=5)["accuracy"]
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])))


def test_groups_of_unequal_size_come_whole() -> None:
    made = Predictions(np.array([0, 0, 0, 1]), np.array([[0.9, 0.1]] * 3 + [[0.9, 0.1]]))
    # Of two groups two are drawn: a alone, one of each, or b alone.
    estimate = metrics.estimate_metrics(made, ["a", "a", "a", "b"], resamples=400)["accuracy"]
    assert (estimate.low, estimate.value, estimate.high) == (0.0, 0.75, 1.0)


def test_images_without_a_group_stand_alone() -> None:
    made = random_predictions(2, images=90, classes=3)
    assert metrics.estimate_metrics(made, [""] * 90) == metrics.estimate_metrics(made)
    named = [f"own {i}" for i in range(80)]
    mixed = metrics.estimate_metrics(made, [*named, *[""] * 10])
    assert mixed == metrics.estimate_metrics(made)
    assert mixed != metrics.estimate_metrics(made, [*named, *["shared"] * 10])


@pytest.mark.parametrize(("images", "a_group"), [(6, 1), (40, 1), (40, 4)])
def test_images_that_are_all_right_or_all_wrong_do_not_make_certain(images: int, a_group: int) -> None:
    targets = np.arange(images) % 3
    groups = [str(row // a_group) for row in range(images)] if a_group > 1 else None
    for answers, value in ((targets, 1.0), ((targets + 1) % 3, 0.0)):
        # All of the 5 % on the one side that there is.
        exact = binomtest(int(value) * images // a_group, images // a_group).proportion_ci(0.9, "exact")
        found = metrics.estimate_metrics(Predictions(targets, 0.1 + 0.7 * np.eye(3)[answers]), groups, resamples=50)
        for name in ("accuracy", "macro_f1"):
            assert found[name].value == value
            assert (found[name].low, found[name].high) == pytest.approx((exact.low, exact.high))


def test_one_mistake_makes_no_better_bound_than_none() -> None:
    targets = np.zeros(40, np.int64)
    wrong = np.eye(2)[targets] * 0.8 + 0.1
    lows = []
    for mistakes in (0, 1, 2):
        answers = wrong.copy()
        answers[:mistakes] = answers[:mistakes, ::-1]
        lows.append(metrics.estimate_metrics(Predictions(targets, answers))["accuracy"].low)
    assert lows == sorted(lows, reverse=True)


def test_one_group_says_nothing_of_others() -> None:
    targets = np.arange(10) % 2
    found = metrics.estimate_metrics(Predictions(targets, np.tile([0.6, 0.4], (10, 1))), ["one"] * 10, resamples=10)
    assert (found["accuracy"].value, found["accuracy"].low, found["accuracy"].high) == (0.5, 0, 1)
    assert (found["log_loss"].low, found["log_loss"].high) == (0, math.inf)
    right = metrics.estimate_metrics(Predictions(targets, np.eye(2)[targets]), ["one"] * 10, resamples=10)
    assert (right["accuracy"].value, right["accuracy"].low, right["accuracy"].high) == (1, 0, 1)
    assert found["log_loss"].bounds("loss") == {"loss_low": 0.0}
    assert json.loads(json.dumps(found["log_loss"].to_dict(), allow_nan=False))["high"] is None


@pytest.mark.parametrize(("groups", "told"), [(["one"] * 4, True), (["one", "one", "two", ""], False), (None, False)])
def test_it_is_said_where_all_images_are_of_one_group(
    groups: list[str] | None, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = np.arange(4) % 2
    Evaluated("test", list("abcd"), Predictions(targets, np.tile([0.6, 0.4], (4, 1))), groups).say("the best network")
    said = capsys.readouterr().out.splitlines()[1]
    alone = ", all of one group, which says nothing of others" if told else ""
    assert said == f"test: 4 images{alone}, the best network"


def test_intervals_of_many_images_and_classes_take_seconds() -> None:
    made = random_presences(0, images=5000, classes=20)
    started = time.process_time()
    metrics.estimate_metrics(made, resamples=200)
    assert time.process_time() - started < 2  # 2,000 resamples: 10 times as long


# Figures


def test_the_bars_of_several_classes_are_counts() -> None:
    targets = np.array([[1, 0], [1, 1], [1, 0], [0, 0]])
    labels = np.array([[1, 0], [0, 1], [1, 1], [0, 1]])
    figure = presence_figure(targets, labels, ["cat", "dog"], "test")
    axes = figure.axes[0]
    found, missed, wrong = ([bar.get_width() for bar in group] for group in axes.containers)
    assert (found, missed, wrong) == ([2, 1], [1, 0], [0, 2])
    assert [bar.get_x() for bar in axes.containers[2]] == [3, 1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    top, bottom = (bar.get_y() for bar in axes.containers[0])
    assert axes.transData.transform((0, top))[1] > axes.transData.transform((0, bottom))[1]


def test_of_very_many_classes_the_worst_are_shown() -> None:
    targets = np.zeros((70, 70), np.int64)
    labels = np.tril(np.ones((70, 70), np.int64))  # class i is wrongly given 70 - i times
    axes = presence_figure(targets, labels, [f"c{i}" for i in range(70)], "test").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"c{i}" for i in range(60)]
    assert "the 60 of 70 classes with the most mistakes" in axes.get_title()


def test_the_confusion_figure_shows_counts_and_names() -> None:
    counts = np.array([[8, 2], [1, 9]])
    axes = confusion_figure(counts, ["cat", "dog"], "test").axes[0]
    assert [text.get_text() for text in axes.texts] == ["8", "2", "1", "9"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert axes.get_xlabel() == "predicted"
