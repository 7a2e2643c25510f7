"""Several processes in one folder of decoded images: building, reading, being killed."""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from datamodules.cache import ImageCache
from datamodules.errors import DataError
from datamodules.locks import unshared, waiting_lock
from datamodules.storage import MemoryStorage
from tests.cached import AMPLE, Decoder, assert_holds, encoded, entries, folder_size, open_cache, picture

FORK = multiprocessing.get_context("fork")
SHAPE = (64, 64, 3)
COUNT = 6
PATIENCE_S = 20


class Child:
    """A process and a pipe to it."""

    def __init__(self, work: Callable[[Connection], None]) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process: BaseProcess = FORK.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def hears(self) -> object:
        assert self.pipe.poll(PATIENCE_S), "nothing was said"
        return self.pipe.recv()

    def tells(self, message: object) -> None:
        self.pipe.send(message)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(PATIENCE_S)

    def end(self) -> None:
        self.process.join(PATIENCE_S)
        assert self.process.exitcode == 0


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def begin(work: Callable[[Connection], None]) -> Child:
        children.append(Child(work))
        return children[-1]

    yield begin
    for child in children:
        if child.process.is_alive():
            child.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def pictures(seed: int) -> list[np.ndarray]:
    return [picture(100 * seed + number, SHAPE) for number in range(COUNT)]


def image_set(seed: int) -> MemoryStorage:
    storage = MemoryStorage([encoded(image) for image in pictures(seed)])
    storage.location = str(seed)
    return storage


def pixels(cache: ImageCache) -> list[np.ndarray | None]:
    return [cache.get(position) for position in range(COUNT)]


def halting_build(folder: Path, seed: int, limit_bytes: int = AMPLE) -> Callable[[Connection], None]:
    """A build that says when two images are written, waits to be told to go on, and says what it kept."""

    def work(pipe: Connection) -> None:
        def progress(done: int, _: int) -> None:
            if done == 2:
                pipe.send("halted")
                pipe.recv()

        cache, decoded = open_cache(folder, image_set(seed), range(COUNT), progress=progress, limit_bytes=limit_bytes)
        pipe.send((len(cache), decoded))
        pipe.recv()

    return work


def waiting_open(folder: Path, seed: int) -> Callable[[Connection], None]:
    """Says when it has to wait, and then what it decoded and what it reads."""

    def work(pipe: Connection) -> None:
        cache, decoded = open_cache(folder, image_set(seed), range(COUNT), on_wait=lambda: pipe.send("waiting"))
        pipe.send((decoded, pixels(cache)))

    return work


def test_of_processes_that_start_together_one_builds(folder: Path, start: Callable[..., Child]) -> None:
    together = FORK.Barrier(4)

    def work(pipe: Connection) -> None:
        storage = image_set(0)
        decoder = Decoder(storage)

        def prepare(row: int) -> np.ndarray:
            time.sleep(0.02)
            return decoder(row)

        together.wait(PATIENCE_S)
        cache, _ = open_cache(folder, storage, range(COUNT), prepare=prepare)
        pipe.send((decoder.rows, pixels(cache)))

    children = [start(work) for _ in range(4)]
    said = [child.hears() for child in children]
    assert sorted(len(decoded) for decoded, _ in said) == [0, 0, 0, COUNT]
    for _, images in said:
        np.testing.assert_array_equal(images, pictures(0))
    assert len(entries(folder)) == 1


def test_a_second_process_waits_and_takes_the_result(folder: Path, start: Callable[..., Child]) -> None:
    builder = start(halting_build(folder, 0))
    assert builder.hears() == "halted"
    second = start(waiting_open(folder, 0))
    assert second.hears() == "waiting"
    assert not second.pipe.poll(0.2)
    builder.tells("go on")
    assert builder.hears() == (COUNT, list(range(COUNT)))
    decoded, images = second.hears()
    assert decoded == []
    np.testing.assert_array_equal(images, pictures(0))
    second.end()
    assert len(entries(folder)) == 1


def test_whoever_waits_for_a_builder_that_is_killed_builds(folder: Path, start: Callable[..., Child]) -> None:
    builder = start(halting_build(folder, 0))
    assert builder.hears() == "halted"
    second = start(waiting_open(folder, 0))
    assert second.hears() == "waiting"
    builder.kill()
    decoded, images = second.hears()
    assert decoded == list(range(COUNT))
    np.testing.assert_array_equal(images, pictures(0))
    assert len(entries(folder)) == 1


@pytest.mark.parametrize("next_seed", [0, 1], ids=["the same images", "other images"])
def test_what_a_killed_build_left_goes_with_the_next_build(
    folder: Path, start: Callable[..., Child], next_seed: int
) -> None:
    builder = start(halting_build(folder, 0))
    assert builder.hears() == "halted"
    builder.kill()
    (left,) = folder.glob("*.building")
    assert (left / "pixels.bin").stat().st_size > 0
    cache, decoded = open_cache(folder, image_set(next_seed), range(COUNT))
    assert decoded == list(range(COUNT))
    assert_holds(cache, pictures(next_seed))
    assert len(entries(folder)) == 1


def test_builders_of_different_images_do_not_disturb_each_other(folder: Path, start: Callable[..., Child]) -> None:
    builder = start(halting_build(folder, 0))
    assert builder.hears() == "halted"
    waits: list[None] = []
    cache, _ = open_cache(folder, image_set(1), range(COUNT), on_wait=lambda: waits.append(None))
    assert waits == []
    builder.tells("go on")
    assert builder.hears() == (COUNT, list(range(COUNT)))
    assert_holds(cache, pictures(1))
    again, decoded = open_cache(folder, image_set(0), range(COUNT))
    assert decoded == []
    assert_holds(again, pictures(0))
    assert len(entries(folder)) == 2


def test_builders_at_the_same_time_share_the_bound(folder: Path, start: Callable[..., Child]) -> None:
    image = int(np.prod(SHAPE))
    limit = COUNT * image + 2 * 4500 + 2 * image
    builder = start(halting_build(folder, 0, limit))
    assert builder.hears() == "halted"
    second, _ = open_cache(folder, image_set(1), range(COUNT), limit_bytes=limit)
    builder.tells("go on")
    kept, _ = builder.hears()
    assert kept == COUNT  # claimed at its start
    assert len(second) <= 2
    assert folder_size(folder) <= limit


def test_readers_keep_an_entry_until_they_end_however_they_end(folder: Path, start: Callable[..., Child]) -> None:
    image = int(np.prod(SHAPE))
    limit = COUNT * image + 4500

    def read(pipe: Connection) -> None:
        cache, _ = open_cache(folder, image_set(0), range(COUNT), limit_bytes=limit)
        pipe.send("reading")
        pipe.recv()
        pipe.send(pixels(cache)[0])

    reader = start(read)
    assert reader.hears() == "reading"
    assert len(open_cache(folder, image_set(1), range(COUNT), limit_bytes=limit)[0]) == 0
    reader.kill()
    assert len(open_cache(folder, image_set(1), range(COUNT), limit_bytes=limit)[0]) == COUNT
    assert len(entries(folder)) == 1


def test_a_forked_reader_keeps_the_entry_of_its_parent(folder: Path, start: Callable[..., Child]) -> None:
    image = int(np.prod(SHAPE))
    limit = COUNT * image + 4500
    cache, _ = open_cache(folder, image_set(0), range(COUNT), limit_bytes=limit)

    def read(pipe: Connection, cache: ImageCache = cache) -> None:
        pipe.recv()
        pipe.send(pixels(cache))

    reader = start(read)
    del cache, read
    assert len(open_cache(folder, image_set(1), range(COUNT), limit_bytes=limit)[0]) == 0
    reader.tells("read")
    np.testing.assert_array_equal(reader.hears(), pictures(0))


def position_read(cache: ImageCache, position: int) -> tuple[int, np.ndarray | None]:
    return os.getpid(), cache.get(position)


def test_spawned_processes_read(folder: Path) -> None:
    cache, _ = open_cache(folder, image_set(0), range(COUNT))
    cache.get(0)  # mapped here already
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        read = pool.starmap(position_read, [(cache, position) for position in range(COUNT)])
    for number, (process, image) in enumerate(read):
        assert process != os.getpid()
        np.testing.assert_array_equal(image, picture(number, SHAPE))


def test_a_build_that_meets_a_limit_of_the_system_says_what_to_do(folder: Path, start: Callable[..., Child]) -> None:
    def work(pipe: Connection) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        try:
            open_cache(folder, image_set(0), range(COUNT))
        except DataError as error:
            pipe.send(str(error))

    assert "lower data.cache_gigabytes" in start(work).hears()
    assert entries(folder) == []


def test_a_lock_has_one_holder_at_a_time_and_leaves_nothing(tmp_path: Path, start: Callable[..., Child]) -> None:
    tally = tmp_path / "tally"
    tally.write_text("0")

    def work(pipe: Connection) -> None:
        before = os.listdir("/dev/fd")
        for _ in range(100):
            with waiting_lock(tmp_path / "one.lock"):
                tally.write_text(str(int(tally.read_text()) + 1))
        pipe.send(len(os.listdir("/dev/fd")) - len(before))

    children = [start(work) for _ in range(4)]
    assert [child.hears() for child in children] == [0] * 4
    assert tally.read_text() == "400"
    assert list(tmp_path.iterdir()) == [tally]


def test_a_process_forked_while_a_lock_is_asked_for_does_not_keep_it(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    (tmp_path / "used").touch()
    with unshared(tmp_path / "used") as free:
        assert free
        start(lambda pipe: pipe.recv())
    with unshared(tmp_path / "used") as free:
        assert free
