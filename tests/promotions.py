"""Registered versions without a network, and ways to promote them, for tests."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from mlflow import MlflowClient

from pipeline.evaluation.predictions import Predictions
from pipeline.registry.tested import Tested
from pipeline.registry.versions import CHALLENGER, CHAMPION, PROVEN

CLASSES = ["a", "b"]
NAME = "cells"
_SERVER_STARTS_SECONDS = 90


def answers(wrong: Sequence[int], count: int = 200, sure: float = 0.9) -> Predictions:
    """Of ``count`` images, half of each class, all but some are answered rightly."""
    targets = np.arange(count) % 2
    said = targets.copy()
    said[list(wrong)] = 1 - said[list(wrong)]
    probabilities = np.full((count, 2), 1 - sure)
    probabilities[np.arange(count), said] = sure
    return Predictions(targets, probabilities)


def exam(predictions: Predictions, images: str = "image", metadata: dict[str, list[str]] | None = None) -> Tested:
    count = len(predictions.targets)
    names = [f"{images}{number:03}.png" for number in range(count)]
    return Tested(CLASSES, names, [f"{number:064x}" for number in range(count)], predictions, None, metadata or {})


def add_version(client: MlflowClient, scratch: Path, test: Tested, alias: str = "", proven: bool = True) -> int:
    """A version of :data:`NAME` that carries a test and nothing else."""
    experiment = client.get_experiment_by_name("fits")
    run = client.create_run(experiment.experiment_id if experiment else client.create_experiment("fits"))
    scratch.mkdir(parents=True, exist_ok=True)
    test.write(scratch / "test.csv")
    content = {"classes": test.classes, "multi_label": test.predictions.multi_label}
    (scratch / "bundle.json").write_text(json.dumps(content))
    client.log_artifacts(run.info.run_id, str(scratch), "model/artifacts/bundle")
    with contextlib.suppress(Exception):  # it is there
        client.create_registered_model(NAME)
    version = client.create_model_version(NAME, f"{run.info.artifact_uri}/model", run.info.run_id).version
    if proven:
        client.set_model_version_tag(NAME, str(version), PROVEN, test.digest)
    if alias:
        client.set_registered_model_alias(NAME, alias, str(version))
    return int(version)


def add_both(client: MlflowClient, scratch: Path) -> None:
    """Version 1, the champion, errs 30 times of 200; version 2, the challenger, 10 times less."""
    add_version(client, scratch / "1", exam(answers(range(30))), CHAMPION)
    add_version(client, scratch / "2", exam(answers(range(20))), CHALLENGER)


def aliases(client: MlflowClient) -> dict[str, int]:
    return {alias: int(number) for alias, number in client.get_registered_model(NAME).aliases.items()}


def promotions_at_once(uri: str, count: int, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run ``promote`` in several processes, which begin to change aliases in the same moment.

    Each has compared, and waits for the others, before it takes the lock.
    """
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pipeline.cli import main\n"
        "from pipeline.registry.promote import Promoter\n"
        "change, folder, count = Promoter._change, Path(sys.argv[1]), int(sys.argv[2])\n"
        "def together(self, decision, back):\n"
        "    (folder / f'ready{sys.argv[3]}').touch()\n"
        "    while len(list(folder.glob('ready*'))) < count: time.sleep(0.01)\n"
        "    return change(self, decision, back)\n"
        "Promoter._change = together\n"
        "sys.exit(main(sys.argv[4:]))\n"
    )
    folder.mkdir()
    arguments = ["promote", f"--name={NAME}", f"--tracking_uri={uri}"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(count), str(number), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    ended = []
    for process in started:
        out, err = process.communicate(timeout=240)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended


@contextlib.contextmanager
def mlflow_server(store: str, folder: Path) -> Iterator[str]:
    """A tracking server on a free port of this machine; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
    with (folder / "server.log").open("w") as log:
        # A session of its own: the server starts processes, which are to end with it.
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        until = time.monotonic() + _SERVER_STARTS_SECONDS
        while True:
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < until, (folder / "server.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
