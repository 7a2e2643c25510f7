"""A real MLflow server in this machine, and a proxy before it that behaves as badly as servers do."""

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Mode = Literal["forward", "error", "hang", "drop"]

_START = 180.0  # seconds; a busy machine takes long to import MLflow


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """``mlflow server`` on a port of 127.0.0.1, which can be killed and started again.

    Args:
        folder: for its database, artifacts and log.
        store: its database; None: an SQLite file in the folder.
    """

    def __init__(self, folder: Path, store: str | None = None) -> None:
        self.folder = folder
        self.store = store or f"sqlite:///{folder / 'server.db'}"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + _START
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"the server did not start:\n{(self.folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        """End it at once, with its children, as a machine that loses its power."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


class Proxy:
    """Passes requests on to a server, or does to them what its mode says.

    ``error`` answers 500; ``hang`` takes requests and never answers; ``drop`` passes every request on and hangs up in
    place of a third of the answers, by chance.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self.mode: Mode = "forward"
        self._chance = random.Random(0)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if proxy.mode == "hang":
                    proxy._released.wait()
                    self.close_connection = True
                    return
                if proxy.mode == "error":
                    self._answer(500, "text/plain", b"out of order")
                    return
                drop = proxy.mode == "drop" and proxy._chance.random() < 1 / 3
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
                try:
                    connection.request(self.command, self.path, body, headers)
                    answer = connection.getresponse()
                    content = answer.read()
                except OSError:
                    drop = True
                finally:
                    connection.close()
                if drop:
                    self.close_connection = True
                    return
                self._answer(answer.status, answer.headers.get("Content-Type", "text/plain"), content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request  # noqa: N815

            def _answer(self, status: int, kind: str, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._released = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def forward(self) -> None:
        """Behave well again; requests that hang are hung up."""
        self.mode = "forward"
        self._released.set()
        self._released = threading.Event()

    def close(self) -> None:
        """Be gone: connections are refused."""
        self.forward()
        self._http.shutdown()
        self._http.server_close()
