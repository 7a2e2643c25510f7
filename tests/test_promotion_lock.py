"""Two promotions at once: one wins; and what becomes of a lock whose holder is gone."""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from pipeline.registry import lock as module
from pipeline.registry.lock import LockError, PromotionLock
from pipeline.registry.versions import CHALLENGER, CHAMPION, PREVIOUS
from pipeline.tracking.fresh import lay_out
from tests.postgresql import postgresql
from tests.promotions import NAME, add_both, aliases, mlflow_server, promotions_at_once

LOCK = f"{NAME}.promotion-lock"


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri, uri)


def models(client: MlflowClient) -> list[str]:
    return [model.name for model in client.search_registered_models()]


# Two at once


def assert_one_wins(uri: str, folder: Path, count: int) -> None:
    client = MlflowClient(uri, uri)
    add_both(client, folder / "scratch")
    ended = promotions_at_once(uri, count, folder / "together")
    told = "\n".join(process.stderr for process in ended)
    assert sorted(process.returncode for process in ended) == [0] + [4] * (count - 1), told
    assert told.count("the champion has become version 2 meanwhile") == count - 1
    assert aliases(client) == {CHAMPION: 2, PREVIOUS: 1, CHALLENGER: 2}
    assert models(client) == [NAME]
    experiment = client.get_experiment_by_name("promotions").experiment_id
    decisions = sorted(run.data.tags["decision"] for run in client.search_runs([experiment]))
    assert decisions == ["promoted"] + ["refused"] * (count - 1)


@pytest.mark.slow
def test_of_two_promotions_at_once_one_wins_on_sqlite(uri: str, tmp_path: Path) -> None:
    assert_one_wins(uri, tmp_path, 2)


@pytest.mark.slow
def test_of_two_promotions_at_once_one_wins_on_a_server(uri: str, tmp_path: Path) -> None:
    with mlflow_server(uri, tmp_path) as address:
        assert_one_wins(address, tmp_path, 2)


@pytest.mark.slow
def test_of_two_promotions_at_once_one_wins_on_postgresql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with postgresql() as address:
        assert_one_wins(address, tmp_path, 2)


# The lock


def test_the_lock_names_its_holder_and_is_gone_afterwards(client: MlflowClient) -> None:
    with PromotionLock(client, NAME, 60) as held:
        held.require_held()
        tags = client.get_registered_model(LOCK).tags
        assert (tags["host"], tags["pid"], tags["seconds"]) == (socket.gethostname(), str(os.getpid()), "60")
        assert tags["started"].endswith("Z")
    assert models(client) == []


def test_a_living_holder_is_waited_for(client: MlflowClient) -> None:
    order: list[str] = []

    def hold() -> None:
        with PromotionLock(client, NAME, 60):
            taken.set()
            time.sleep(0.5)
            order.append("first")

    taken = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    with PromotionLock(client, NAME, 60):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_living_holder_is_never_robbed(client: MlflowClient) -> None:
    with PromotionLock(client, NAME, 0.2) as held:
        with pytest.raises(LockError, match=f"held by process {os.getpid()} on .* which still runs"):
            PromotionLock(client, NAME, 0.2).__enter__()
        assert held.holder().token == held.token


def leave_a_lock(uri: str, seconds: float) -> None:
    """Another process takes the lock and is killed."""
    code = (
        "import os, signal, sys; from mlflow import MlflowClient; from pipeline.registry.lock import PromotionLock\n"
        "PromotionLock(MlflowClient(sys.argv[1], sys.argv[1]), sys.argv[2], float(sys.argv[3])).__enter__()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, uri, NAME, str(seconds)], timeout=120)
    assert done.returncode != 0


def test_a_dead_holder_keeps_the_lock_for_the_stated_time_and_no_longer(uri: str, client: MlflowClient) -> None:
    leave_a_lock(uri, 2)
    assert models(client) == [LOCK]
    began = time.monotonic()
    with PromotionLock(client, NAME, 1) as held:  # the longer time of both counts
        assert 2 <= time.monotonic() - began < 20
        held.require_held()
    assert models(client) == []


def foreign_lock(client: MlflowClient, token: str = "0") -> None:
    tags = {"token": token, "host": "elsewhere", "pid": "1", "started": "2026-01-01T00:00:00Z", "seconds": "0.3"}
    client.create_registered_model(LOCK, tags)


def test_a_lock_from_another_machine_is_taken_over_after_its_time(client: MlflowClient) -> None:
    foreign_lock(client)
    with PromotionLock(client, NAME, 0.3) as held:
        assert held.holder().token == held.token


def test_who_was_robbed_of_the_lock_changes_nothing_more(client: MlflowClient) -> None:
    with PromotionLock(client, NAME, 60) as held:
        client.delete_registered_model(LOCK)
        with pytest.raises(LockError, match=f"lost {LOCK}"):
            held.require_held()
        foreign_lock(client)
        with pytest.raises(LockError, match=f"lost {LOCK}"):
            held.require_held()
    assert models(client) == [LOCK], "the lock of another one was removed"


def test_who_held_the_lock_for_too_long_changes_nothing_more(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PromotionLock(client, NAME, 60) as held:
        later = time.monotonic() + 31
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: later, sleep=time.sleep))
        with pytest.raises(LockError, match="after 31 s"):
            held.require_held()


def test_a_slow_process_does_not_remove_the_lock_of_the_next_one(client: MlflowClient) -> None:
    foreign_lock(client, "dead")
    slow = PromotionLock(client, NAME, 2)
    dead = slow.holder()
    with PromotionLock(client, NAME, 2) as held:  # takes the dead one's lock over before the slow one does
        slow._free(dead)
        held.require_held()


def test_of_many_that_wait_for_a_dead_one_each_has_the_lock_alone(uri: str, client: MlflowClient) -> None:
    foreign_lock(client)
    inside: list[int] = []
    most: list[int] = []

    def enter(_: int) -> None:
        with PromotionLock(MlflowClient(uri, uri), NAME, 3) as held:
            inside.append(1)
            held.require_held()
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(enter, range(6)))
    assert most == [1] * 6
    assert models(client) == []


def test_a_lock_that_names_nobody_is_left_to_people(client: MlflowClient) -> None:
    client.create_registered_model(LOCK)
    with pytest.raises(LockError, match=r"held by nobody that is known.*; delete the registered models"):
        PromotionLock(client, NAME, 0.1).__enter__()
    assert models(client) == [LOCK]


def test_a_lock_that_is_just_being_removed_has_no_holder(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    real, reads = MlflowClient.get_registered_model, []

    def half_gone(self: MlflowClient, name: str) -> object:
        reads.append(name)
        if len(reads) > 1:
            return real(self, name)
        self.delete_registered_model(name)
        return SimpleNamespace(tags={})

    foreign_lock(client)
    monkeypatch.setattr(MlflowClient, "get_registered_model", half_gone)
    with PromotionLock(client, NAME, 60) as held:
        held.require_held()
