"""Metrics against scikit-learn, and what their intervals are worth."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss

from pipeline.evaluation import metrics
from pipeline.evaluation.figures import confusion_figure
from pipeline.evaluation.predictions import Predictions


def random_predictions(seed: int, images: int, classes: int, skill: float = 2.0) -> Predictions:
    rng = np.random.default_rng(seed)
    targets = rng.choice(classes, images, p=rng.dirichlet(np.ones(classes)))
    logits = rng.normal(size=(images, classes))
    logits[np.arange(images), targets] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Predictions(targets, probabilities)


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


def test_the_confusion_figure_shows_counts_and_names() -> None:
    counts = np.array([[8, 2], [1, 9]])
    axes = confusion_figure(counts, ["cat", "dog"], "test").axes[0]
    assert [text.get_text() for text in axes.texts] == ["8", "2", "1", "9"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
    assert axes.get_xlabel() == "predicted"
