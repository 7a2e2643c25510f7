"""Speaking to a tracking store: what counts as away, and what is told of its address."""

from pathlib import Path

import pytest
import requests

from pipeline.cli import main
from pipeline.tracking.store import is_away, without_password

AWAY = "http://127.0.0.1:9"  # the discard port, where nothing listens


def test_only_what_the_network_raises_means_that_a_server_is_away() -> None:
    assert is_away(requests.exceptions.ConnectionError())
    assert not is_away(OSError(28, "No space left on device"))
    assert not is_away(FileNotFoundError("an image"))
    later = RuntimeError("in the course of it")
    later.__context__ = requests.exceptions.ReadTimeout()
    assert is_away(later)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql+psycopg2://ada:s3cret@host:5432/runs", "postgresql+psycopg2://ada:***@host:5432/runs"),
        ("http://ada:p@host:5000", "http://ada:***@host:5000"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////home/ada/a:b@c/mlflow.db", "sqlite:////home/ada/a:b@c/mlflow.db"),
    ],
)
def test_a_password_is_not_shown(address: str, shown: str) -> None:
    assert without_password(address) == shown


@pytest.mark.parametrize(
    "command",
    [
        ["promote", "--name=cells"],
        ["register", "--name=cells", "--run=abc"],
    ],
    ids=lambda command: command[0],
)
def test_a_registry_that_is_not_there_is_one_clear_error(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert f"expected a store that runs were tracked in, found none at 'sqlite:///{tmp_path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*command, f"--tracking_uri={AWAY}"]) == 2
    assert f"expected the tracking server '{AWAY}' to answer, found that it does not" in capsys.readouterr().err
