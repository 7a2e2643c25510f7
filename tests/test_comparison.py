"""Comparing two models on the same images, held to independent references."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import recall_score
from torchmetrics.functional.classification import multiclass_calibration_error

from pipeline.evaluation.comparison import expected_calibration_error, mcnemar, paired_differences, recalls
from pipeline.evaluation.metrics import estimate_metrics
from pipeline.evaluation.predictions import Predictions


def drawn(seed: int, count: int = 300, classes: int = 3, strength: float = 1.0) -> Predictions:
    """Answers that are right the more often, the larger ``strength``; equal seeds share their truth."""
    targets = np.random.default_rng(0).integers(0, classes, count)
    logits = np.random.default_rng(seed).normal(size=(count, classes))
    logits[np.arange(count), targets] += strength
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Predictions(targets, probabilities)


def test_a_difference_is_that_of_the_metrics_and_has_the_sign_of_who_is_better():
    better, worse = drawn(1, strength=2.0), drawn(2)
    found = paired_differences(better, worse, resamples=200)
    one, other = estimate_metrics(better, resamples=1), estimate_metrics(worse, resamples=1)
    for name in ("accuracy", "macro_f1"):
        assert found[name].value == pytest.approx(one[name].value - other[name].value)
    assert found["log_loss"].value == pytest.approx(other["log_loss"].value - one["log_loss"].value)
    assert all(difference.low > 0 for difference in found.values())
    turned = paired_differences(worse, better, resamples=200)
    assert turned["accuracy"].high == pytest.approx(-found["accuracy"].low)


def test_the_interval_is_that_of_the_normal_approximation_for_pairs():
    one, other = drawn(1, count=2000, strength=1.2), drawn(2, count=2000)
    difference = one.right.astype(float) - other.right
    spread = 1.96 * difference.std() / math.sqrt(len(difference))
    found = paired_differences(one, other, resamples=2000)["accuracy"]
    assert found.low == pytest.approx(difference.mean() - spread, abs=0.003)
    assert found.high == pytest.approx(difference.mean() + spread, abs=0.003)


def test_a_model_against_itself_differs_by_nothing():
    model = drawn(1)
    assert all((d.value, d.low, d.high) == (0, 0, 0) for d in paired_differences(model, model, resamples=50).values())
    assert mcnemar(model, model) == mcnemar(model, model).__class__(0, 0, 1.0)


def test_groups_are_resampled_as_one():
    one, other = drawn(1, strength=2.0), drawn(2)
    groups = [str(row // 30) for row in range(300)]
    alone = paired_differences(one, other, resamples=300)["accuracy"]
    copies = Predictions(np.repeat(one.targets, 5), np.repeat(one.probabilities, 5, axis=0))
    others = Predictions(np.repeat(other.targets, 5), np.repeat(other.probabilities, 5, axis=0))
    repeated = [str(row // 5) for row in range(1500)]
    grouped = paired_differences(copies, others, repeated, resamples=300)["accuracy"]
    assert (grouped.low, grouped.high) == (alone.low, alone.high), "copies of an image tell nothing more"
    assert paired_differences(one, other, groups, resamples=300)["accuracy"].low != alone.low


def test_one_group_shows_no_difference():
    found = paired_differences(drawn(1, strength=3.0), drawn(2), ["one"] * 300, resamples=20)
    assert found["accuracy"].value > 0.2
    assert (found["accuracy"].low, found["accuracy"].high) == (-1, 1)
    assert (found["log_loss"].low, found["log_loss"].high) == (-math.inf, math.inf)
    assert found["log_loss"].to_dict()["low"] is None


def test_mcnemar_counts_a_group_once():
    """Ten images of one patient that are lost together are one loss."""
    targets = np.zeros(20, np.int64)
    one, other = np.full((20, 2), [0.9, 0.1]), np.full((20, 2), [0.9, 0.1])
    one[:10] = other[10:12] = [0.1, 0.9]
    groups = ["a"] * 10 + ["b", "c"] + [""] * 8
    found = mcnemar(Predictions(targets, one), Predictions(targets, other), groups)
    assert (found.won, found.lost, found.p) == (2, 1, 1.0)
    assert mcnemar(Predictions(targets, one), Predictions(targets, other)).p < 0.05


def test_mcnemar_is_exact():
    targets = np.zeros(20, np.int64)
    one, other = np.full((20, 2), [0.9, 0.1]), np.full((20, 2), [0.9, 0.1])
    other[:9] = one[9:10] = [0.1, 0.9]
    found = mcnemar(Predictions(targets, one), Predictions(targets, other))
    assert (found.won, found.lost) == (9, 1)
    assert found.p == pytest.approx(2 * (1 + 10) / 2**10)


def test_the_calibration_error_is_that_of_torchmetrics():
    model = drawn(3, count=500, strength=1.5)
    expected = multiclass_calibration_error(
        torch.from_numpy(model.probabilities), torch.from_numpy(model.targets), 3, n_bins=15, norm="l1"
    )
    assert expected_calibration_error(model) == pytest.approx(float(expected), abs=1e-6)


def test_the_calibration_of_several_classes_counts_each_answer():
    targets = np.array([[1, 0], [1, 1], [0, 0], [0, 1]])
    model = Predictions(targets, np.full((4, 2), 0.75), multi_label=True)
    assert expected_calibration_error(model) == pytest.approx(0.25)  # 4 of 8 are right


def test_recalls_are_those_of_scikit_learn():
    model = drawn(4)
    shares, counts = recalls(model)
    np.testing.assert_allclose(shares, recall_score(model.targets, model.labels, average=None))
    assert counts.tolist() == np.bincount(model.targets).tolist()
    several = Predictions(
        np.array([[1, 0], [1, 1], [0, 0]]), np.array([[0.9, 0.1], [0.2, 0.7], [0.3, 0.3]]), multi_label=True
    )
    assert recalls(several)[0].tolist() == [0.5, 1.0]


def test_a_class_without_images_has_no_recall():
    shares, counts = recalls(Predictions(np.array([0, 0]), np.array([[0.9, 0.1], [0.4, 0.6]])))
    assert shares[0] == 0.5
    assert np.isnan(shares[1])
    assert counts.tolist() == [2, 0]
