"""A folder of fetched files that never holds more than it may."""

import os
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import pytest
from filelock import FileLock

from datamodules.chunks import SLOTS, ChunkCache

SIZE = 1000


def contents(name: str) -> bytes:
    return name.encode().ljust(SIZE, b".")


def writes(name: str, seconds: float = 0.0, fetched: list[str] | None = None) -> Callable[[BinaryIO], None]:
    def fetch(file: BinaryIO) -> None:
        file.write(contents(name)[:500])
        time.sleep(seconds)
        file.write(contents(name)[500:])
        if fetched is not None:
            fetched.append(name)

    return fetch


def read(cache: ChunkCache, name: str, fetched: list[str] | None = None, seconds: float = 0.0) -> bytes:
    with cache.open(name, SIZE, writes(name, seconds, fetched)) as file:
        file.seek(0)
        return file.read()


def held(folder: Path) -> int:
    """Bytes in a cache folder, at a moment when nothing is added."""
    with FileLock(folder / "room.lock"):
        found = {}
        for file in folder.rglob("*"):
            try:
                status = file.stat()
            except FileNotFoundError:  # finished in the meantime, under another name
                continue
            found[status.st_ino] = status.st_size if file.is_file() else 0
        return sum(found.values())


def test_a_file_is_fetched_once(tmp_path):
    cache, fetched = ChunkCache(tmp_path / "cache", 10 * SIZE), []
    for _ in range(3):
        assert read(cache, "v/a.bin", fetched) == contents("v/a.bin")
    assert fetched == ["v/a.bin"]
    assert read(ChunkCache(tmp_path / "cache", 10 * SIZE), "v/a.bin", fetched) == contents("v/a.bin")
    assert fetched == ["v/a.bin"]


def test_what_was_asked_for_the_longest_ago_goes_first(tmp_path):
    cache, fetched = ChunkCache(tmp_path, 3 * SIZE), []
    for name in ("a.bin", "b.bin", "c.bin", "a.bin", "d.bin", "a.bin", "e.bin"):
        assert read(cache, name, fetched) == contents(name)
        time.sleep(0.002)
    assert fetched == ["a.bin", "b.bin", "c.bin", "d.bin", "e.bin"]
    assert sorted(file.name for file in tmp_path.glob("*.bin")) == ["a.bin", "d.bin", "e.bin"]
    assert held(tmp_path) == 3 * SIZE


def test_all_that_is_in_the_folder_counts(tmp_path):
    """Data of an earlier run, at another address, makes room for today's."""
    read(ChunkCache(tmp_path, 3 * SIZE), "old/a.bin")
    read(ChunkCache(tmp_path, 3 * SIZE), "old/b.bin")
    cache = ChunkCache(tmp_path, 2 * SIZE)
    read(cache, "new/a.bin")
    assert held(tmp_path) == 2 * SIZE
    assert not (tmp_path / "old" / "a.bin").exists()


def test_the_room_is_taken_before_a_file_is_fetched(tmp_path):
    cache = ChunkCache(tmp_path, 2 * SIZE)
    read(cache, "a.bin")
    read(cache, "b.bin")
    seen = []

    def fetch(file: BinaryIO) -> None:
        seen.append(held(tmp_path))
        file.write(contents("c.bin"))

    cache.open("c.bin", SIZE, fetch).close()
    assert seen == [2 * SIZE]


def test_a_fetch_that_fails_leaves_nothing(tmp_path):
    cache = ChunkCache(tmp_path, 2 * SIZE)

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise ConnectionError("gone")

    for _ in range(2 * SLOTS):
        with pytest.raises(ConnectionError, match="gone"):
            cache.open("a.bin", SIZE, fail)
    assert held(tmp_path) == 0
    assert read(cache, "a.bin") == contents("a.bin")


def test_many_threads_and_little_room(tmp_path):
    """Every thread gets its bytes, the limit holds at every moment, and nobody waits for ever."""
    cache = ChunkCache(tmp_path, 2 * SIZE)
    names = [f"{number}.bin" for number in range(12)]
    peaks, stop = [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            peaks.append(held(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as pool:
        asked = [names[(7 * step) % 12] for step in range(120)]
        got = list(pool.map(lambda name: read(cache, name, seconds=0.001), asked, timeout=60))
    stop.set()
    watcher.join()
    assert got == [contents(name) for name in asked]
    assert max([*peaks, held(tmp_path)]) == 2 * SIZE


def test_different_files_are_fetched_at_the_same_time(tmp_path):
    cache = ChunkCache(tmp_path, 20 * SIZE)
    together = threading.Barrier(3)
    names = list({zlib.crc32(name.encode()) % SLOTS: name for name in map("{}.bin".format, range(20))}.values())[:3]

    def fetch(file: BinaryIO) -> None:
        together.wait(timeout=10)
        file.write(b"." * SIZE)

    with ThreadPoolExecutor(3) as pool:
        for file in pool.map(lambda name: cache.open(name, SIZE, fetch), names, timeout=20):
            file.close()


def test_one_file_is_fetched_once_by_many_threads(tmp_path):
    cache, fetched = ChunkCache(tmp_path, 20 * SIZE), []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: read(cache, "a.bin", fetched, 0.05), range(8), timeout=20))
    assert fetched == ["a.bin"]


def _dies_while_it_fetches(folder: Path, name: str) -> None:
    def die(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        os._exit(9)

    ChunkCache(folder, 2 * SIZE).open(name, SIZE, die)


def test_what_a_killed_process_leaves_does_not_count(tmp_path):
    for name in ("a.bin", "b.bin", "c.bin"):
        process = get_context("fork").Process(target=_dies_while_it_fetches, args=(tmp_path, name))
        process.start()
        process.join(timeout=20)
        assert process.exitcode == 9
    assert list(tmp_path.glob("*.part"))
    cache = ChunkCache(tmp_path, 2 * SIZE)
    for name in ("d.bin", "a.bin", "e.bin"):
        assert read(cache, name) == contents(name)
    assert held(tmp_path) == 2 * SIZE
