"""A real tracking server that fails in every way: training does not notice, and every point arrives exactly once."""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tracking_server import Mode, Proxy, Server, free_port

from pipeline.cli import main
from pipeline.tracking.logger import MLflowLogger
from pipeline.tracking.replay import Replay
from tests.postgresql import postgresql
from tests.registered import Run, frame
from tests.support import fast, write_images

pytestmark = pytest.mark.slow  # a server takes some ten seconds to start


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


def log_steps(logger: MLflowLogger, first: int, last: int) -> float:
    """The longest that one call took, in seconds."""
    longest = 0.0
    for step in range(first, last):
        began = time.perf_counter()
        logger.log_metrics({"loss": 1 / (step + 1), "constant": 1.0}, step)
        longest = max(longest, time.perf_counter() - began)
        time.sleep(0.002)
    return longest


def assert_complete(server: Server, name: str, steps: int, status: str = "FINISHED") -> None:
    client = MlflowClient(server.uri, server.uri)
    experiment = client.get_experiment_by_name("pipeline")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert run.info.status == status
    for metric, value in (("loss", lambda step: 1 / (step + 1)), ("constant", lambda step: 1.0)):
        history = client.get_metric_history(run.info.run_id, metric)
        assert sorted((point.step, point.value) for point in history) == [(s, value(s)) for s in range(steps)]
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["note.txt"]


@pytest.mark.parametrize("mode", ["forward", "error", "hang", "drop"])
def test_a_server_that_fails_for_a_while(server: Server, proxy: Proxy, tmp_path: Path, mode: Mode) -> None:
    logger = MLflowLogger(tracking_uri=proxy.uri, folder=tmp_path / f"{mode}-{tmp_path.parent.name}")
    with logger.closing():
        log_steps(logger, 0, 300)
        (logger.folder / "note.txt").write_text("kept")
        logger.log_file(logger.folder / "note.txt")
        proxy.mode = mode
        assert log_steps(logger, 300, 900) < 1
        if mode != "drop":  # which it goes on with
            proxy.forward()
    assert main(["sync", str(logger.folder)]) == 0
    assert_complete(server, logger.folder.name, 900)


def test_a_server_that_is_away_for_the_whole_run(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = MLflowLogger(tracking_uri=f"http://127.0.0.1:{free_port()}", folder=tmp_path / f"away-{os.getpid()}")
    with logger.closing():
        assert log_steps(logger, 0, 300) < 1
        (logger.folder / "note.txt").write_text("kept")
        logger.log_file(logger.folder / "note.txt")
    assert logger.run_id is None
    shown = capsys.readouterr().out
    assert f"to send them  python -m pipeline sync {logger.folder}" in shown
    assert "303 operations wait" in shown  # the steps, beginning, file and end

    # The server comes back where it was expected.
    journal = logger.folder / "journal.jsonl"
    journal.write_text(journal.read_text().replace(logger.tracking_uri, server.uri))
    assert main(["sync", str(logger.folder)]) == 0
    assert "303 operations sent" in capsys.readouterr().out
    assert_complete(server, logger.folder.name, 300)
    assert main(["sync", str(logger.folder)]) == 0
    assert "nothing was missing" in capsys.readouterr().out
    assert_complete(server, logger.folder.name, 300)


def test_an_operation_that_is_repeated_changes_nothing(server: Server, tmp_path: Path) -> None:
    logger = MLflowLogger(tracking_uri=server.uri, folder=tmp_path / f"twice-{os.getpid()}")
    with logger.closing():
        logger.log_hyperparams({"a": 1})
        log_steps(logger, 0, 10)
        logger.log_metrics({"odd": math.nan}, 0)
        logger.log_metrics({"odd": math.inf}, 1)
        (logger.folder / "note.txt").write_text("kept")
        logger.log_file(logger.folder / "note.txt")
        logger.log_dataset("data", "digest", "source", "{}")
    (logger.folder / "journal.sent.json").unlink()  # as if no answer had ever come
    assert main(["sync", str(logger.folder)]) == 0
    assert_complete(server, logger.folder.name, 10)
    run = MlflowClient(server.uri).get_run(logger.run_id)
    assert len(run.inputs.dataset_inputs) == 1
    nan, largest = MlflowClient(server.uri).get_metric_history(logger.run_id, "odd")
    assert math.isnan(nan.value)
    assert largest.value > 1e308  # how MLflow's databases keep infinity


def test_what_the_server_refuses_does_not_keep_the_rest_back(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = MLflowLogger(tracking_uri=server.uri, folder=tmp_path / f"refused-{os.getpid()}")
    with logger.closing():
        log_steps(logger, 0, 20)
        logger.log_metrics({"no $ in names": 1.0}, 0)
        logger.log_file(tmp_path / "nowhere.txt")
        log_steps(logger, 20, 40)
        (logger.folder / "note.txt").write_text("kept")
        logger.log_file(logger.folder / "note.txt")
    assert "not taken     2 by the tracking store" in capsys.readouterr().out
    assert_complete(server, logger.folder.name, 40)


def test_a_run_that_the_server_created_and_was_thought_lost_is_not_there_twice(server: Server, tmp_path: Path) -> None:
    logger = MLflowLogger(tracking_uri=server.uri, folder=tmp_path / f"late-{os.getpid()}")
    with logger.closing():
        log_steps(logger, 0, 5)
        (logger.folder / "note.txt").write_text("kept")
        logger.log_file(logger.folder / "note.txt")
        assert logger.settle(seconds=30)
        # A request that hung is carried out after it was given up and repeated.
        client = MlflowClient(server.uri)
        tags = {"pipeline.key": client.get_run(logger.run_id).data.tags["pipeline.key"]}
        client.create_run(logger.experiment_id, tags=tags, run_name=logger.folder.name)
    assert_complete(server, logger.folder.name, 5)


def test_a_server_that_lost_its_data_gets_it_again(tmp_path: Path) -> None:
    replaced = Server(tmp_path)
    replaced.start()
    try:
        logger = MLflowLogger(tracking_uri=replaced.uri, folder=tmp_path / "runs" / "again")
        with logger.closing():
            log_steps(logger, 0, 20)
            (logger.folder / "note.txt").write_text("kept")
            logger.log_file(logger.folder / "note.txt")
            assert logger.settle(seconds=30)
            replaced.kill()
            (tmp_path / "server.db").unlink()
            replaced.start()
            log_steps(logger, 20, 40)
        assert main(["sync", str(logger.folder)]) == 0
        assert_complete(replaced, "again", 40)
    finally:
        replaced.kill()


def test_fit_with_a_server_that_is_away(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.fitting._PATIENCE", 1.0)
    write_images(tmp_path / "images", per_class=10)
    away = f"http://127.0.0.1:{free_port()}"
    arguments = [*fast(tmp_path / "images"), "--trainer.max_epochs=1", "--registered_model_name=colours"]
    assert main(["fit", *arguments, f"--logger.tracking_uri={away}"]) == 0
    (folder,) = Path("runs").iterdir()
    shown = capsys.readouterr().out
    assert "not registered  colours: the tracking server does not take the run" in shown
    assert "python -m pipeline register --name colours --checkpoint" in shown
    assert "(run not there yet)" in shown
    assert f"python -m pipeline sync {folder}" in shown
    summary = (folder / "summary.json").read_text()
    assert '"run_id": null' in summary
    assert '"registered": null' in summary

    for file in ("journal.jsonl", "run.json", "summary.json"):
        (folder / file).write_text((folder / file).read_text().replace(away, server.uri))
    assert main(["sync", str(folder)]) == 0
    run_id = Replay(folder, server.uri).sent.run_id
    assert run_id is not None
    for file in ("run.json", "summary.json"):
        assert f'"run_id": "{run_id}"' in (folder / file).read_text()
    run = MlflowClient(server.uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "test/accuracy" in run.data.metrics


def test_a_model_comes_to_a_server_is_proven_and_promoted_there(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, f"--logger.tracking_uri={server.uri}", "--registered_model_name=colours")
    assert run.summary["registered"] == {"name": "colours", "version": "1"}
    assert f"python -m pipeline promote --name colours --tracking_uri {server.uri}" in capsys.readouterr().out
    (tmp_path / "rules.yaml").write_text("max_ece: null\n")
    promote = ["promote", "--name=colours", f"--tracking_uri={server.uri}", f"--rules={tmp_path / 'rules.yaml'}"]
    assert main(promote) == 0
    assert main(["register", "--name=colours", f"--checkpoint={run.checkpoint}"]) == 0
    assert main(promote) == 0, "equal is enough"
    aliases = MlflowClient(server.uri).get_registered_model("colours").aliases
    assert {name: int(version) for name, version in aliases.items()} == {
        "challenger": 2,
        "champion": 2,
        "previous-champion": 1,
    }
    rows = run.tested[:3]
    answer = run.load("colours").predict(frame([run.images / row["path"] for row in rows]))
    assert list(answer["label"]) == [row["label"] for row in rows]


def test_a_run_that_its_server_has_not_taken_cannot_be_registered(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    run = Run(tmp_path, f"--logger.tracking_uri={away}")
    capsys.readouterr()
    assert main(["register", "--name=colours", f"--checkpoint={run.checkpoint}"]) == 2
    assert f"run `python -m pipeline sync {run.folder}` first" in capsys.readouterr().err


def test_a_server_on_postgresql(tmp_path: Path) -> None:
    with postgresql() as address:
        server = Server(tmp_path, address)
        try:
            server.start()
            logger = MLflowLogger(tracking_uri=server.uri, folder=tmp_path / "runs" / "elephant")
            with logger.closing():
                log_steps(logger, 0, 200)
                (logger.folder / "note.txt").write_text("kept")
                logger.log_file(logger.folder / "note.txt")
            (logger.folder / "journal.sent.json").unlink()
            assert main(["sync", str(logger.folder)]) == 0
            assert_complete(server, "elephant", 200)
        finally:
            server.kill()
