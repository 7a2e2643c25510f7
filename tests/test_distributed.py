"""Two CPU processes (gloo): one run, one version, the same numbers as one process."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from pipeline.cli import main
from pipeline.models.backbones import create_backbone
from tests.support import fast, write_images

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own: Lightning starts the second one by running the same again."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def probabilities(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["path"] for row in rows], np.array([[float(row[k]) for k in row if k.startswith("p_")] for row in rows])


@pytest.mark.slow
def test_two_processes_make_one_run_and_agree_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # 7 validation and 9 test images: the two processes hold unequally many.
    write_images(tmp_path / "images", per_class=15)
    (tmp_path / "images" / "red" / "014.png").unlink()
    arguments = [*fast(tmp_path / "images"), "--data.val_fraction=0.15"]
    done = pipeline("fit", *arguments, *TWO, "--trainer.max_epochs=2", "--registered_model_name=colours")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1/2") == 1
    assert "Traceback" not in done.stderr

    (folder,) = Path("runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    client = MlflowClient(summary["tracking_uri"], summary["tracking_uri"])
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert len(client.search_model_versions("name='colours'")) == 1
    shown = [item.value for item in client.get_metric_history(run.info.run_id, "val/accuracy")]
    assert summary["metrics"]["val/accuracy"]["value"] == pytest.approx(max(shown), abs=1e-6)

    paths, values = probabilities(folder / "predictions.csv")
    assert len(paths) == summary["metrics"]["test/accuracy"]["n"] == len(set(paths))
    capsys.readouterr()
    assert main(["test", *arguments, f"--ckpt_path={folder}", "--output=one.csv"]) == 0
    one_paths, one_values = probabilities(Path("one.csv"))
    assert one_paths == paths
    np.testing.assert_allclose(one_values, values, atol=1e-6)
    assert f"accuracy  {summary['metrics']['test/accuracy']['value']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=6)
    (tmp_path / "images" / "red" / "000.png").write_bytes(b"")
    failed = pipeline("fit", *fast(tmp_path / "images"), *TWO, "--trainer.max_epochs=1")
    assert failed.returncode == 2
    assert "red/000.png (it is empty)" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_signal_that_one_process_hears_stops_both_at_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=15)
    arguments = ["fit", *fast(tmp_path / "images"), *TWO, "--trainer.max_epochs=2", "--trainer.logger=false"]
    arguments += ["--trainer.callbacks=tests.support.InterruptAt", "--trainer.callbacks.step=1"]
    arguments += ["--trainer.callbacks.rank=1"]
    stopped = pipeline(*arguments)
    assert stopped.returncode == 130, stopped.stderr
    assert "to go on" in stopped.stdout
    (folder,) = Path("runs").iterdir()
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2
    done = pipeline(*arguments, "--ckpt_path=last")
    assert done.returncode == 0, done.stderr
    assert (folder / "summary.json").is_file()


@pytest.mark.slow
def test_a_head_that_one_process_solved_is_the_head_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=20)
    torch.manual_seed(0)
    save_file(create_backbone("resnet20", 10).state_dict(), "weights.safetensors")
    done = pipeline(
        "fit",
        *fast(tmp_path / "images"),
        *TWO,
        "--data.val_fraction=0.3",
        "--model.backbone=resnet20",
        "--model.weights=weights.safetensors",
        "--finetuning=ProbeThenFineTune",
        f"--finetuning.features={tmp_path / 'features'}",
        # What was solved is what validates.
        "--model.learning_rate=1e-9",
        "--model.head_learning_rate=1e-9",
        "--trainer.max_epochs=1",
    )
    assert done.returncode == 0, done.stderr
    (folder,) = Path("runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    client = MlflowClient(summary["tracking_uri"], summary["tracking_uri"])
    (shown,) = client.get_metric_history(summary["run_id"], "val/accuracy")
    assert summary["metrics"]["val/accuracy"]["value"] == pytest.approx(shown.value, abs=1e-6)
    assert shown.value > 0.9
