"""What every test can rely on."""

import os
import socket
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants


def pytest_configure(config: pytest.Config) -> None:
    """Processes that run side by side have a thread each: waiting for each other they take several times as long."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What is made once for a module is made in one process: its tests go there together, and first."""
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def shares(file: str) -> bool:
        return 'scope="module"' in (config.rootpath / file).read_text(encoding="utf-8")

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if shares(file) else nodeid

    return Together(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(autouse=True, scope="session")
def _no_tracking_server_of_the_person() -> None:
    """Tests write to stores of their own, whatever the environment says."""
    patch = pytest.MonkeyPatch()
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        patch.delenv(name, raising=False)


@pytest.fixture(autouse=True, scope="session")
def _no_features_of_the_person(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a plan finds out is kept where the tests are, for as long as they last."""
    pytest.MonkeyPatch().setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of class folders: ``image_folder({"cat": 5, "train/dog": 3})``; every picture is another."""

    from tests.images import save  # imports torch, which the process that only deals tests out does without

    def make(counts: dict[str, int], name: str = "images") -> Path:
        for number, (folder, count) in enumerate(counts.items()):
            (tmp_path / name / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                save(tmp_path / name / folder / f"{i:03d}.png", phase=number + 0.1 * i)
        return tmp_path / name

    return make


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache, a hub that is asked, and a socket that leads nowhere and remembers who tried."""
    attempts: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        attempts.append(args)
        raise OSError("this test must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty_cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    assert not attempts, f"something left the machine: {attempts}"
