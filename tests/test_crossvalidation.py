"""``python -m pipeline crossvalidate``: every image is predicted once, by a network that did not see it."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import crossvalidation
from pipeline.cli import main
from pipeline.errors import UserError
from tests.support import fast, write_images


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_folds_are_pooled_and_go_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    write_images(tmp_path / "images", per_class=10)
    arguments = [*fast(tmp_path / "images"), "--trainer.max_epochs=1"]
    run_fold = crossvalidation._run_fold

    def interrupted(folds: Any, number: int) -> str:
        if number == 2:
            raise KeyboardInterrupt
        return run_fold(folds, number)

    with monkeypatch.context() as patch:
        patch.setattr(crossvalidation, "_run_fold", interrupted)
        assert main(["crossvalidate", "--folds=2", *arguments]) == 130
    (folder,) = Path("runs").glob("*-folds")
    assert f"python -m pipeline crossvalidate --go_on {folder}" in capfd.readouterr().out
    (first,) = [path for path in Path("runs").iterdir() if path != folder]

    assert main(["crossvalidate", f"--go_on={folder}"]) == 0
    shown = capfd.readouterr().out
    assert "===== fold 2 of 2 =====" in shown
    assert "===== fold 1 of 2 =====" not in shown
    (second,) = [path for path in Path("runs").iterdir() if path not in (folder, first)]
    pooled = rows_of(folder / "predictions.csv")
    assert pooled == [*rows_of(first / "predictions.csv"), *rows_of(second / "predictions.csv")]
    everything = {path.relative_to(tmp_path / "images").as_posix() for path in (tmp_path / "images").rglob("*.png")}
    assert {row["path"] for row in pooled} == everything
    assert len(pooled) == len(everything) == 30
    summary = json.loads((folder / "summary.json").read_text())
    accuracy = summary["metrics"]["test/accuracy"]
    assert accuracy["n"] == 30
    assert accuracy["value"] == pytest.approx(np.mean([row["label"] == row["target"] for row in pooled]))
    assert f"accuracy  {accuracy['value']:.4f}" in shown
    assert len(summary["by_fold"]["test/accuracy"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--folds=1"], "--folds: expected at least 2, found 1"),
        (["--data.fold=1 of 3"], "--data.fold: expected no value, found one"),
        (["--registered_model_name=x"], "--registered_model_name: expected no value"),
        (["--go_on=nowhere"], "found no readable folds.json in 'nowhere'"),
        (["--go_on=nowhere", "--data.root=x"], "--go_on: expected no other setting"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        crossvalidation.run_crossvalidate(arguments)
    assert said in str(caught.value)
    assert not Path("runs").exists()
