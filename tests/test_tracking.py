"""Tracking: one run from start to end, and a local store that several processes can open at once."""

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.errors import UserError
from pipeline.tracking.logger import MLflowLogger
from pipeline.tracking.store import prepare_store, resolve_tracking_uri

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def logger(tmp_path: Path) -> MLflowLogger:
    return MLflowLogger(tracking_uri=f"sqlite:///{tmp_path / 'm.db'}", folder=tmp_path / "runs" / "mine")


def run_of(logger: MLflowLogger):  # type: ignore[no-untyped-def]
    return MlflowClient(logger.tracking_uri).get_run(logger.run_id)


def test_the_address_is_absolute_and_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_tracking_uri("sqlite:///sub/x.db") == f"sqlite:///{tmp_path}/sub/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert resolve_tracking_uri(None) == "http://127.0.0.1:9"
    assert resolve_tracking_uri("sqlite:////a.db") == "sqlite:////a.db"


def test_nothing_is_written_before_the_run_begins(logger: MLflowLogger, tmp_path: Path) -> None:
    assert logger.run_id is None
    assert not list(tmp_path.iterdir())


def test_the_run_stays_open_until_its_owner_ends_it(logger: MLflowLogger) -> None:
    with logger.closing():
        logger.log_metrics({"a": 1.0}, step=0)
        logger.finalize("success")  # the trainer's, after each of its stages
        assert logger.settle(seconds=10)
        assert run_of(logger).info.status == "RUNNING"
        assert run_of(logger).data.metrics == {"a": 1.0}
    assert run_of(logger).info.status == "FINISHED"
    assert run_of(logger).info.run_name == "mine"


@pytest.mark.parametrize(
    ("raised", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED"), (SystemExit, "FAILED")]
)
def test_the_status_tells_how_it_ended(logger: MLflowLogger, raised: type[BaseException], status: str) -> None:
    def work() -> None:
        with logger.closing():
            logger.log_metrics({"kept": 2.0})
            raise raised

    with pytest.raises(raised):
        work()
    assert run_of(logger).info.status == status
    assert run_of(logger).data.metrics == {"kept": 2.0}


def test_every_step_arrives_once(logger: MLflowLogger) -> None:
    with logger.closing():
        for step in range(1000):
            logger.log_metrics({"loss": float(step)}, step=step)
    history = MlflowClient(logger.tracking_uri).get_metric_history(logger.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(step, float(step)) for step in range(1000)]


def test_parameters_are_flat_and_can_be_logged_again(logger: MLflowLogger) -> None:
    nested = {"model": {"backbone": "resnet18"}, "long": "x" * 9000, **{f"p{i}": i for i in range(250)}}
    with logger.closing():
        logger.log_hyperparams(nested)
        logger.log_hyperparams(nested)
    params = run_of(logger).data.params
    assert params["model.backbone"] == "resnet18"
    assert len(params) == 252


def test_a_run_can_be_gone_on_with(logger: MLflowLogger) -> None:
    with logger.closing():
        logger.log_metrics({"a": 1.0}, step=0)
    again = MLflowLogger(tracking_uri=logger.tracking_uri, folder=logger.folder)
    with again.closing():
        again.log_metrics({"a": 2.0}, step=1)
        assert again.settle(seconds=10)
        assert run_of(logger).info.status == "RUNNING"
    assert len(MlflowClient(logger.tracking_uri).get_metric_history(logger.run_id, "a")) == 2
    assert run_of(logger).info.status == "FINISHED"


def test_a_store_that_cannot_be_opened_is_a_mistake_to_mend(tmp_path: Path) -> None:
    logger = MLflowLogger(tracking_uri="gopher://nowhere", folder=tmp_path)
    with pytest.raises(UserError, match="expected an MLflow store that can be reached"):
        _ = logger.experiment


def test_a_store_that_is_there_is_left_as_it_is(logger: MLflowLogger) -> None:
    with logger.closing():
        logger.log_metrics({"a": 1.0})
    prepare_store(logger.tracking_uri)
    assert run_of(logger).data.metrics == {"a": 1.0}


@pytest.mark.slow
def test_several_processes_can_open_a_fresh_store_at_once(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from pipeline.tracking.logger import MLflowLogger\n"
        f"folder = Path('{tmp_path}/runs') / str(os.getpid())\n"
        f"logger = MLflowLogger(tracking_uri='sqlite:///{tmp_path}/m.db', folder=folder)\n"
        "with logger.closing():\n    logger.log_metrics({'a': 1.0})\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for process in started:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    client = MlflowClient(f"sqlite:///{tmp_path}/m.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "pipeline"]
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FINISHED"] * 4
