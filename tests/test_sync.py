"""``python -m pipeline sync`` with a local store, and what the journal keeps."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mlflow import MlflowClient

from pipeline.cli import main
from pipeline.tracking import system_metrics
from pipeline.tracking.journal import Journal, RunBusyError, RunLock, last_entry, read_entries
from pipeline.tracking.logger import MLflowLogger
from pipeline.tracking.store import pointing_mlflow_at

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def logger(tmp_path: Path) -> MLflowLogger:
    return MLflowLogger(tracking_uri=f"sqlite:///{tmp_path / 'm.db'}", folder=tmp_path / "runs" / "mine")


def test_a_run_that_is_being_trained_is_left_alone(logger: MLflowLogger, capsys: pytest.CaptureFixture[str]) -> None:
    with logger.closing():
        logger.log_metrics({"a": 1.0})
        assert main(["sync", str(logger.folder)]) == 2
        assert f"it is still being trained by process {os.getpid()}" in capsys.readouterr().err
    assert main(["sync", str(logger.folder)]) == 0


def test_the_lock_of_another_process_goes_with_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from pipeline.tracking.journal import RunLock\n"
        f"lock = RunLock(Path('{tmp_path}')); lock.acquire()\n"
        "if os.fork() == 0:\n    import time; time.sleep(30); os._exit(0)\n"  # as a reading process outlives training
        "print(os.getpid(), flush=True); sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as holder:  # type: ignore[call-overload]
        number = holder.stdout.readline().strip()
        lock = RunLock(tmp_path)
        with pytest.raises(RunBusyError) as busy:
            lock.acquire()
        assert busy.value.process == number
        holder.kill()
        holder.wait()
        lock.acquire()
        lock.release()
        os.killpg(int(number), 9)


def test_sync_of_what_is_no_run_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(tmp_path)]) == 2
    assert "expected a run folder with a journal.jsonl, found none" in capsys.readouterr().err
    assert main(["sync"]) == 2
    assert "RUN_FOLDER" in capsys.readouterr().err


def test_what_is_no_run_does_not_keep_others_back(
    logger: MLflowLogger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logger.closing():
        logger.log_metrics({"a": 1.0})
    (logger.folder / "journal.sent.json").unlink()
    assert main(["sync", str(tmp_path), str(logger.folder)]) == 2
    shown = capsys.readouterr()
    assert "operations sent" in shown.out
    assert "expected a run folder with a journal.jsonl, found none" in shown.err


def test_a_line_that_was_torn_after_the_end_is_cut_off(logger: MLflowLogger) -> None:
    with logger.closing():
        logger.log_metrics({"a": 1.0})
    with (logger.folder / "journal.jsonl").open("a") as file:
        file.write('{"time": 1, "op": "res')
    for _ in range(2):
        assert main(["sync", str(logger.folder)]) == 0


def test_a_run_that_a_person_deleted_is_left_deleted(logger: MLflowLogger, capsys: pytest.CaptureFixture[str]) -> None:
    with logger.closing():
        logger.log_metrics({"a": 1.0})
    assert logger.run_id is not None
    client = MlflowClient(logger.tracking_uri, logger.tracking_uri)
    client.delete_run(logger.run_id)
    journal = Journal(logger.folder)
    journal.append("resume", {})
    journal.append("metrics", {"step": 1, "values": {"a": 2.0}})
    journal.close()
    for _ in range(2):
        assert main(["sync", str(logger.folder)]) == 0
    assert "not taken     3 by the tracking store" in capsys.readouterr().out
    assert client.get_run(logger.run_id).info.lifecycle_stage == "deleted"


def test_a_line_that_was_torn_is_cut_off_and_one_that_is_being_written_waits(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("metrics", {"values": {"a": 1.0}}, at=5)
    journal.close()
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"time":6,"op":"met')
    assert [entry.time for entry in read_entries(tmp_path)] == [5]
    last = last_entry(tmp_path)
    assert last is not None
    assert last.time == 5
    journal = Journal(tmp_path)
    journal.append("end", {}, at=7)
    journal.close()
    assert [(entry.operation, entry.time) for entry in read_entries(tmp_path)] == [("metrics", 5), ("end", 7)]


def test_a_line_that_the_disk_lost_does_not_keep_the_rest_back(logger: MLflowLogger) -> None:
    with logger.closing():
        logger.log_metrics({"a": 1.0})
    file = logger.folder / "journal.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b"\0\0\0\n", *lines[2:]]))
    (logger.folder / "journal.sent.json").unlink()
    assert main(["sync", str(logger.folder)]) == 0
    assert MlflowClient(logger.tracking_uri).get_run(logger.run_id).info.status == "FINISHED"


def test_a_journal_without_its_beginning_is_one_clear_error_and_harms_no_other_run(
    logger: MLflowLogger, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = logger.folder.with_name("damaged")
    damaged.mkdir(parents=True)
    (damaged / "journal.jsonl").write_bytes(b"\0\0\0\n")
    with logger.closing():
        logger.log_metrics({"a": 1.0})
    assert MlflowClient(logger.tracking_uri).get_run(logger.run_id).info.status == "FINISHED"
    assert main(["sync", str(damaged)]) == 2
    assert "found a damaged line" in capsys.readouterr().err


def test_the_journal_keeps_numbers_that_are_none(logger: MLflowLogger) -> None:
    with logger.closing():
        logger.log_metrics({"nan": math.nan, "inf": math.inf, "least": -math.inf, "tensor": torch.tensor(0.5)}, 3)  # type: ignore[dict-item]
    (entry,) = [entry for entry in read_entries(logger.folder) if entry.operation == "metrics"]
    assert entry.content == {"step": 3, "values": {"nan": "nan", "inf": "inf", "least": "-inf", "tensor": 0.5}}
    assert math.isnan(MlflowClient(logger.tracking_uri).get_run(logger.run_id).data.metrics["nan"])


def test_tables_are_shown_as_tables(logger: MLflowLogger) -> None:
    with logger.closing():
        logger.log_table(["metric", "value"], [["accuracy", 0.5], ["loss", 1.0]], "metrics.json")
    client = MlflowClient(logger.tracking_uri)
    with pointing_mlflow_at(logger.tracking_uri):
        table = client.load_table(client.get_run(logger.run_id).info.experiment_id, "metrics.json", [logger.run_id])
    assert table.to_dict("list") == {"metric": ["accuracy", "loss"], "value": [0.5, 1.0]}
    shown = json.loads(client.get_run(logger.run_id).data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "metrics.json", "type": "table"}]


def test_the_machine_is_measured() -> None:
    metrics = system_metrics.measure()
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= metrics.keys()
    assert 0 < metrics["system/system_memory_usage_percentage"] < 100


def test_gpus_are_measured_where_they_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        """As of the package, which a machine without GPUs need not have."""

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=NVMLError))

    def utilization(index: int) -> int:
        if index == 1:
            raise NVMLError("Not Supported")
        return 40

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda index: 2_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=8_000_000))
    found = {name: value for name, value in system_metrics.measure().items() if "gpu" in name}
    assert found == {
        "system/gpu_0_utilization_percentage": 40.0,
        "system/gpu_0_memory_usage_megabytes": 2.0,
        "system/gpu_0_memory_usage_percentage": 25.0,
    }
