"""Ctrl-C, SIGTERM and SIGKILL, and going on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from pipeline.cli import main
from tests.support import fast, write_images


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=15)  # 29 images for training: 3 steps of 8 an epoch
    handler = signal.getsignal(signal.SIGINT)
    yield tmp_path / "images"
    signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C once it has seen one


def tracked_runs(home: Path) -> list[tuple[str, str]]:
    client = MlflowClient(f"sqlite:///{home}/mlflow.db", f"sqlite:///{home}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [(run.info.run_id, run.info.status) for run in client.search_runs(experiments)]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def start_long_run(images: Path, workers: int) -> subprocess.Popen[bytes]:
    """A training with a process group of its own, in its third epoch of many; what it says is in ``out.txt``."""
    arguments = [*fast(images), f"--data.num_workers={workers}", "--trainer.max_epochs=500", "--patience=500"]
    command = [sys.executable, "-m", "pipeline", "fit", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with open("out.txt", "w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    deadline = time.monotonic() + 120
    while "epoch   2/" not in Path("out.txt").read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    return process


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(1, id="mid-epoch"),
        pytest.param(2, id="end of an epoch", marks=pytest.mark.slow),
        pytest.param(4, id="second epoch", marks=pytest.mark.slow),
        pytest.param(8, id="very end", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(images: Path, tmp_path: Path, step: int) -> None:
    arguments = ["fit", *fast(images), "--trainer.max_epochs=3", "--patience=50"]
    assert main(arguments) == 0
    (undisturbed,) = Path("runs").iterdir()
    expected = weights(undisturbed / "last.ckpt")

    interrupting = ["--trainer.callbacks=tests.support.InterruptAt", f"--trainer.callbacks.step={step}"]
    assert main([*arguments, *interrupting]) == 130
    (interrupted,) = set(Path("runs").iterdir()) - {undisturbed}
    assert torch.load(interrupted / "last.ckpt", weights_only=True)["global_step"] == step + 1
    assert not (interrupted / "summary.json").exists()
    assert [status for _, status in tracked_runs(tmp_path)].count("KILLED") == 1

    # The callback sends nothing more: the step it waits for is over.
    assert main([*arguments, *interrupting, "--ckpt_path=last"]) == 0
    assert set(Path("runs").iterdir()) == {undisturbed, interrupted}
    assert [status for _, status in tracked_runs(tmp_path)] == ["FINISHED", "FINISHED"]
    resumed = weights(interrupted / "last.ckpt")
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (undisturbed, interrupted))
    assert first["metrics"] == second["metrics"]


def test_last_without_a_run_to_go_on_with_is_an_error(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *fast(images), "--ckpt_path=last"]) == 2
    assert "expected an unfinished run with this configuration" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_last_passes_over_other_configurations_and_finished_runs(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", *fast(images), "--trainer.max_epochs=1"]
    assert main(arguments) == 0
    assert main([*arguments, "--ckpt_path=last"]) == 2
    assert "(1 with this configuration are finished, 0 have another one)" in capsys.readouterr().err
    assert main([*arguments, "--model.weight_decay=0.1", "--ckpt_path=last"]) == 2
    assert "(0 with this configuration are finished, 1 have another one)" in capsys.readouterr().err


def test_going_on_with_other_images_is_refused(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", *fast(images), "--trainer.max_epochs=1"]
    assert main(arguments) == 0
    (folder,) = Path("runs").iterdir()
    (images / "red" / "000.png").unlink()
    assert main([*arguments, "--trainer.max_epochs=2", f"--ckpt_path={folder}"]) == 2
    assert "expected the images and the split that the checkpoint was trained with" in capsys.readouterr().err


def test_a_run_without_tracking_goes_on_too(images: Path) -> None:
    arguments = ["fit", *fast(images), "--trainer.max_epochs=1", "--trainer.logger=false"]
    interrupting = ["--trainer.callbacks=tests.support.InterruptAt", "--trainer.callbacks.step=0"]
    assert main([*arguments, *interrupting]) == 130
    assert main([*arguments, *interrupting, "--ckpt_path=last"]) == 0
    (folder,) = Path("runs").iterdir()
    assert json.loads((folder / "summary.json").read_text())["run_id"] is None


def test_a_run_that_was_terminated_is_killed_and_can_go_on(images: Path, tmp_path: Path) -> None:
    arguments = ["fit", *fast(images), "--trainer.max_epochs=2"]
    terminating = ["--trainer.callbacks=tests.support.InterruptAt", "--trainer.callbacks.step=1"]
    terminating += [f"--trainer.callbacks.number={int(signal.SIGTERM)}"]
    before = signal.getsignal(signal.SIGTERM)
    assert main([*arguments, *terminating]) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [status for _, status in tracked_runs(tmp_path)] == ["KILLED"]
    (folder,) = Path("runs").iterdir()
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2
    assert main([*arguments, *terminating, "--ckpt_path=last"]) == 0
    assert [status for _, status in tracked_runs(tmp_path)] == ["FINISHED"]


def test_a_run_that_fails_is_failed(images: Path, tmp_path: Path) -> None:
    failing = ["--trainer.callbacks=tests.support.FailAt", "--trainer.callbacks.step=1"]
    assert main(["fit", *fast(images), "--trainer.max_epochs=1", *failing]) == 1
    assert [status for _, status in tracked_runs(tmp_path)] == ["FAILED"]


@pytest.mark.slow
def test_a_run_that_was_killed_is_closed_by_the_next_one_or_by_sync(images: Path, tmp_path: Path) -> None:
    arguments = [*fast(images), "--trainer.max_epochs=2"]
    killing = ["--trainer.callbacks=tests.support.InterruptAt", "--trainer.callbacks.step=4"]
    killing += [f"--trainer.callbacks.number={int(signal.SIGKILL)}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    killed = subprocess.run([sys.executable, "-m", "pipeline", "fit", *arguments, *killing], env=environment)
    assert killed.returncode == -signal.SIGKILL
    (dead,) = Path("runs").iterdir()
    assert main(["sync", str(dead)]) == 0
    assert [status for _, status in tracked_runs(tmp_path)] == ["KILLED"]
    journal = (dead / "journal.jsonl").read_bytes()

    # As if it had not been synchronised yet, and had died within a line.
    (dead / "journal.jsonl").write_bytes(b"".join(journal.splitlines(keepends=True)[:-1]) + b'{"time":17')
    (dead / "journal.sent.json").unlink()
    assert main(["fit", *arguments]) == 0
    assert sorted(status for _, status in tracked_runs(tmp_path)) == ["FINISHED", "KILLED"]
    assert (dead / "journal.jsonl").read_bytes() == journal


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_to_every_process_of_a_run(images: Path, tmp_path: Path, workers: int) -> None:
    process = start_long_run(images, workers)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert "Traceback" not in Path("out.txt").read_text()
    assert [status for _, status in tracked_runs(tmp_path)] == ["KILLED"]
    (folder,) = Path("runs").iterdir()
    assert (folder / "last.ckpt").is_file()


@pytest.mark.slow
def test_a_real_ctrl_c_with_reading_processes(images: Path, tmp_path: Path) -> None:
    process = start_long_run(images, workers=2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    assert process.wait(timeout=60) == 130
    shown = Path("out.txt").read_text()
    assert "Traceback" not in shown
    assert shown.count("Interrupted: stopping after this step") == 1
    assert [status for _, status in tracked_runs(tmp_path)] == ["KILLED"]
    (folder,) = Path("runs").iterdir()
    assert (folder / "last.ckpt").is_file()


def test_a_run_that_stopped_early_stays_stopped(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in its tests, it goes on with these; one that begins from its checkpoint waits anew."""
    monkeypatch.setattr("pipeline.task._log_loss", lambda *_: torch.tensor(1.0))  # nothing gets better
    arguments = ["fit", *fast(images), "--trainer.logger=false", "--monitor=val/loss", "--trainer.max_epochs=9"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.fitting.Fitting._choose", interrupted)
        assert main([*arguments, "--patience=2"]) == 130
    (folder,) = Path("runs").iterdir()
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 2
    assert main([*arguments, "--patience=2", "--ckpt_path=last"]) == 0
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 2
    assert main([*arguments, "--patience=3", f"--ckpt_path={folder / 'last.ckpt'}"]) == 0
    (second,) = set(Path("runs").iterdir()) - {folder}
    assert torch.load(second / "last.ckpt", weights_only=True)["epoch"] == 6
