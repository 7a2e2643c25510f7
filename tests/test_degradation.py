"""The degradation benchmark's arithmetic, its table and its figure, on made-up runs."""

import json
from typing import Any

import pytest

from benchmarks.degradation import as_text, differences, figure, table


@pytest.fixture
def record() -> dict[str, Any]:
    """Two seeds of each arm, three epochs; the last losses are easy to reckon with."""
    last = {"plain20": (0.2, 0.4), "plain56": (0.5, 0.6), "resnet20": (0.3, 0.3), "resnet56": (0.1, 0.2)}
    runs = [
        {"arm": arm, "seed": seed, "seconds": 10.0 + seed, "train_loss": [0.9, 0.7, loss], "val_loss": [0.8, 0.8, 0.8]}
        for arm, losses in reversed(last.items())
        for seed, loss in enumerate(losses)
    ]
    return {"command": "python benchmarks/degradation.py", "images": {"train": 1706}, "runs": runs}


def test_depths_are_compared_seed_by_seed(record: dict[str, Any]) -> None:
    assert differences(record["runs"], "plain56", "plain20") == pytest.approx([0.3, 0.2])
    assert differences(record["runs"], "resnet56", "resnet20") == pytest.approx([-0.2, -0.1])


def test_the_table_says_means_ranges_and_how_many(record: dict[str, Any]) -> None:
    lines = [" ".join(line.split()) for line in table(record).splitlines()]
    assert lines[0] == "training loss of epoch 3, 1,706 images, mean over 2 seeds [lowest, highest]"
    assert lines[1] == "plain20 0.3000 [ 0.2000, 0.4000] 10 s a run"
    assert "plain56 - plain20 +0.2500 [+0.2000, +0.3000] n = 2 seeds" in lines
    assert "resnet56 - resnet20 -0.1500 [-0.2000, -0.1000] n = 2 seeds" in lines


def test_plain_is_left_and_residual_right(record: dict[str, Any]) -> None:
    left, right = figure(record).axes
    assert (left.get_title(), right.get_title()) == ("plain", "residual")
    bold = {line.get_label(): line for line in left.lines if line.get_label().endswith("layers")}
    assert list(bold["56 layers"].get_ydata()) == pytest.approx([0.9, 0.7, 0.55])
    assert bold["56 layers"].get_linewidth() > bold["20 layers"].get_linewidth()


def test_one_line_a_run(record: dict[str, Any]) -> None:
    text = as_text(record)
    assert json.loads(text) == record
    assert text.count("\n    {") == len(record["runs"])
