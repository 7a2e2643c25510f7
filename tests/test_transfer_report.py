"""What the benchmark of transfer concludes from results."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.functional.classification import multiclass_calibration_error
from transfer_report import calibration_error, calibration_gaps, mean_of, report

CASES = ["few", "full"]


def result(case: str, contestant: str, seed: int, accuracy: float, **other: Any) -> dict[str, Any]:
    right = [number < round(100 * accuracy) for number in range(100)]
    given = {"case": case, "contestant": contestant, "seed": seed, "accuracy": accuracy, "macro_f1": accuracy}
    return {
        **given,
        "log_loss": 0.5,
        "seconds": 10.0,
        "others": 0.0,
        "images": 100,
        "gaps": calibration_gaps([0.8] * 100, right),
        **other,
    }


def both(accuracies: dict[str, list[float]], **other: Any) -> list[dict[str, Any]]:
    return [
        result(case, name, seed, accuracy, **other)
        for case in CASES
        for name, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_the_interval_of_one_sample_is_the_t_interval() -> None:
    sample = [0.71, 0.74, 0.69, 0.78, 0.75]
    found = mean_of([sample])
    low, high = stats.t.interval(0.95, 4, np.mean(sample), stats.sem(sample))
    assert (found.value - found.half, found.value + found.half) == pytest.approx((low, high))


def test_the_interval_of_several_samples_shrinks_with_their_number() -> None:
    sample = [0.71, 0.74, 0.69, 0.78, 0.75]
    one, four = mean_of([sample]), mean_of([sample] * 4)
    assert four.value == pytest.approx(one.value)
    # Half as wide, and with 16 degrees of freedom instead of 4.
    assert four.half == pytest.approx(one.half / 2 * stats.t.ppf(0.975, 16) / stats.t.ppf(0.975, 4))
    assert np.isnan(mean_of([sample, [0.7]]).half)


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    logits = 3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(4, (500,), generator=torch.Generator().manual_seed(1))
    probabilities = logits.softmax(1)
    expected = multiclass_calibration_error(probabilities, targets, num_classes=4, n_bins=15, norm="l1")
    confidences, labels = probabilities.max(1)
    told, right = confidences.tolist(), (labels == targets).tolist()
    in_two_tests = [calibration_gaps(told[:200], right[:200]), calibration_gaps(told[200:], right[200:])]
    assert calibration_error(in_two_tests, 500) == pytest.approx(float(expected), abs=1e-6)


def test_ours_is_compared_with_the_best_peer_seed_by_seed() -> None:
    results = both({"ours": [0.80, 0.70, 0.90], "good": [0.78, 0.68, 0.88], "bad": [0.5, 0.5, 0.5]})
    shown = report(results, CASES)
    assert "ours against good, paired by seed" in shown
    assert "against bad" not in shown
    assert "met      +2.0 ± 0.0 points of accuracy, n = 3 (at least +1.5)" in shown
    assert "not met  1.00 of its seconds (at most 0.5)" in shown


@pytest.mark.parametrize(
    ("ours", "verdict"), [([0.70, 0.71], "met    "), ([0.68, 0.68], "not met"), ([0.9], "not met")]
)
def test_a_case_is_lost_where_the_whole_interval_lies_behind(ours: list[float], verdict: str) -> None:
    shown = report(both({"ours": ours, "peer": [0.70, 0.70]}), CASES)
    (line, *_) = [line for line in shown.splitlines() if "not all below" in line]
    assert line.startswith(f"  {verdict}")


def test_ours_with_a_budget_is_compared_and_held_to_nothing() -> None:
    shown = report(both({"ours --budget=1m": [0.70, 0.71], "peer": [0.72, 0.73]}), CASES)
    assert "ours --budget=1m against peer, paired by seed" in shown
    assert "  -2.0 ± 0.0 points of accuracy, n = 2\n  1.00 of its seconds" in shown
    assert "met " not in shown


def test_all_who_ran_every_case_stand_side_by_side() -> None:
    ours = both({"ours": [0.8, 0.8]}, log_loss=0.3)
    results = [*ours, *both({"peer": [0.7, 0.7]}), result("few", "absent", 0, 0.9)]
    shown = report(results, CASES)
    assert "| contestant | few | full | mean | ours ahead | log loss | ours ahead | seconds |" in shown
    assert "| ours | 80.0 ± 0.0 | 80.0 ± 0.0 | 80.0 ± 0.0 |  | 0.300 |  | 10 |\n| peer | 70.0 ± 0.0" in shown
    assert "| 70.0 ± 0.0 | +10.0 ± 0.0 | 0.500 | +0.200 ± 0.000 | 10 |" in shown
    assert "| absent | 90" not in shown
    assert "| peer | 70.0 ± 0.0 | 70.0 ± 0.0 | 70.0 ± 0.0 |  | 0.500 |  | 10 |" in report(results[4:], CASES)


def test_disturbed_seconds_do_not_count() -> None:
    quiet = both({"ours": [0.8, 0.8], "peer": [0.7, 0.7]})
    for entry in quiet:
        if entry["seed"] == 1:
            entry |= {"seconds": 99.0, "others": 0.3}
    assert "99" not in report(quiet, CASES)
    shown = report(both({"ours": [0.8, 0.8], "peer": [0.7, 0.7]}, others=0.3), CASES)
    assert "no seconds to compare" in shown
    assert "nan" not in shown


def test_seconds_of_another_kind_of_processor_do_not_count() -> None:
    mixed = both({"ours": [0.8, 0.8, 0.8], "peer": [0.7, 0.7, 0.7]}, bf16=True)
    for entry in mixed:
        if entry["seed"] == 1:
            entry |= {"seconds": 99.0, "bf16": False}
    assert "99" not in report(mixed, CASES)
    assert "| 80.0 ± 0.0 |" in report(mixed, CASES)


def test_where_no_processors_with_bf16_timed_both_those_without_are_compared() -> None:
    mixed = both({"ours": [0.8, 0.8], "peer": [0.7, 0.7]}, bf16=True)
    for entry in [*mixed]:
        seconds = 30.0 if entry["contestant"] == "ours" else 100.0
        if entry["case"] == CASES[0] and entry["contestant"] == "ours":
            entry |= {"seconds": seconds, "bf16": False}
        elif entry["case"] == CASES[0]:
            mixed.append({**entry, "seed": 7, "seconds": seconds, "bf16": False})
    shown = report(mixed, CASES)
    assert "0.30 of its seconds, without bf16" in shown
    assert f"of its seconds in the {len(CASES) - 1} of {len(CASES)} cases timed alike" in shown
