"""The registered model behind a real server: what it answers, what it refuses, and with how little it runs."""

import base64
import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image
from tracking_server import free_port

from pipeline.cli import main
from tests.registered import Run, frame

pytestmark = pytest.mark.slow  # a server takes some ten seconds to start

STARTS_SECONDS = 120
ADDRESS = "models:/colours@champion"


class ModelServer:
    """``mlflow models serve`` of the champion.

    Args:
        uri: of the registry.
        folder: to work in, and for its log.
        python: of the environment that serves.
    """

    def __init__(self, uri: str, folder: Path, python: str = sys.executable) -> None:
        self.port = free_port()
        self.log = folder / "serve.log"
        command = [python, "-m", "mlflow", "models", "serve", "-m", ADDRESS, "--env-manager", "local"]
        path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": uri}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> "ModelServer":
        until = time.monotonic() + STARTS_SECONDS
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=5)
                return self
            if time.monotonic() > until or self.process.poll() is not None:
                self.__exit__()
                raise AssertionError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ask(self, body: dict[str, Any] | bytes) -> tuple[int, Any]:
        """Status and answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/invocations", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


def request_of(*images: bytes, **params: Any) -> dict[str, Any]:
    rows = [[base64.b64encode(image).decode()] for image in images]
    return {"dataframe_split": {"columns": ["image"], "data": rows}, "params": params}


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """A small PNG that claims to be of many gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


HOSTILE = {
    "no image": b"nonsense",
    "empty": b"",
    "cut short": encoded("JPEG")[:200],
    "too large": bomb(),
    "a page": b"<html><script>alert(1)</script></html>",
    "a drawing that reads files": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "an array of objects": b"\x93NUMPY\x01\x00\x76\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    + b" " * 60
    + b"\n",
}


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("served"))
    assert run.register("colours") == 0
    assert main(["promote", "--name=colours", f"--tracking_uri={run.uri}", f"--rules={lenient(run.home)}"]) == 0
    return run


def lenient(folder: Path) -> Path:
    rules = folder / "rules.yaml"
    rules.write_text("max_ece: null\n")
    return rules


@pytest.fixture(scope="module")
def server(champion: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with ModelServer(champion.uri, tmp_path_factory.mktemp("server")) as server:
        yield server


def assert_answers_as_tested(server: ModelServer, run: Run) -> None:
    rows = run.tested[:4]
    images = [(run.images / row["path"]).read_bytes() for row in rows]
    status, answer = server.ask(request_of(*images, top_k=2))
    assert status == 200, answer
    for given, row in zip(answer["predictions"], rows, strict=True):
        assert given["label"] == row["label"]
        assert given["score"] == pytest.approx(float(row["score"]), abs=1e-4)
        assert given["top_labels"][0] == row["label"]


def test_the_server_answers_as_tested(server: ModelServer, champion: Run) -> None:
    assert_answers_as_tested(server, champion)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_usual_formats_are_read(server: ModelServer, kind: str) -> None:
    status, answer = server.ask(request_of(encoded(kind)))
    assert status == 200, answer


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_image_is_refused_by_its_row_and_the_server_lives(
    server: ModelServer, champion: Run, name: str
) -> None:
    good = (champion.images / champion.tested[0]["path"]).read_bytes()
    status, answer = server.ask(request_of(good, HOSTILE[name]))
    assert status == 400
    assert "row 1: expected the bytes of an encoded image" in answer["message"]
    assert "Traceback" not in json.dumps(answer), "where our files lie is nobody's business"
    assert server.ask(request_of(good))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"nonsense",
        b"",
        {"dataframe_split": {"columns": ["path"], "data": [["/etc/passwd"]]}},
        {"dataframe_split": {"columns": ["image"], "data": [[None]]}},
        {"dataframe_split": {"columns": ["image"], "data": [[5]]}},
        request_of(encoded("PNG"), top_k=9),
        request_of(encoded("PNG"), top_k="many"),
    ],
    ids=["no JSON", "empty", "a path", "null", "a number", "too many", "a word"],
)
def test_a_request_of_another_kind_is_refused_and_the_server_lives(server: ModelServer, body: Any) -> None:
    status, answer = server.ask(body)
    assert 400 <= status < 500, answer
    assert "Traceback" not in json.dumps(answer)
    assert server.ask(request_of(encoded("PNG")))[0] == 200


def test_two_versions_live_in_one_process(champion: Run) -> None:
    assert champion.register("colours", "--threshold=0.999999") == 0  # the challenger
    rows = champion.tested[:4]
    images = frame([champion.images / row["path"] for row in rows])
    mlflow.set_tracking_uri(champion.uri)
    try:
        sure, careful = (mlflow.pyfunc.load_model(f"models:/colours@{name}") for name in ("champion", "challenger"))
    finally:
        mlflow.set_tracking_uri(None)
    for _ in range(2):
        assert list(sure.predict(images)["label"]) == [row["label"] for row in rows]
        assert set(careful.predict(images)["label"]) == {""}


def test_a_fresh_environment_with_nothing_but_the_models_requirements_serves_it(champion: Run, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(champion.uri)
    try:
        requirements = mlflow.pyfunc.get_model_dependencies(ADDRESS)
    finally:
        mlflow.set_tracking_uri(None)
    venv.create(tmp_path / "environment", with_pip=True)
    python = str(tmp_path / "environment" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
    installed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    for package in ("torch", "lightning", "timm", "albumentations", "transfer-pipeline"):
        assert f"\n{package} " not in installed
    # A package of the person's own that is called as this one does no harm.
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("raise RuntimeError('not this one')\n")
    with ModelServer(champion.uri, tmp_path, python) as server:
        assert_answers_as_tested(server, champion)
        status, answer = server.ask(request_of(bomb()))
        assert status == 400
        assert "row 0: expected the bytes of an encoded image" in answer["message"]
