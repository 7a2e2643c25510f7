"""Scoring in bulk over Ray Data: the answers, what cannot be read, workers that die, and what is refused."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline.errors import UserError
from pipeline.registry.inference import Answers, usable_cores
from pipeline.registry.loading import pin
from pipeline.registry.served import ImageClassifier
from pipeline.scoring import ray as scoring
from pipeline.scoring.ray import Worker, score
from tests.registered import Run

pytestmark = pytest.mark.slow  # Ray takes some ten seconds to start

ADDRESS = "models:/colours@champion"
PATIENCE_SECONDS = 120
NOT_AN_IMAGE = b"nonsense"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("scored"))
    assert run.register("colours") == 0
    run.client.set_registered_model_alias("colours", "champion", "1")
    return run


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def table(folder: Path, **columns: Any) -> Path:
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "part.parquet")
    return folder


def answers(target: Path) -> list[dict[str, Any]]:
    return sorted(pq.read_table(target).to_pylist(), key=lambda row: row["id"])


def content(run: Run, row: dict[str, str]) -> bytes:
    return (run.images / row["path"]).read_bytes()


def assert_as_tested(answer: dict[str, Any], tested: dict[str, str]) -> None:
    assert answer["error"] is None
    assert answer["label"] == tested["label"]
    assert answer["score"] == pytest.approx(float(tested["score"]), abs=1e-4)
    classes = ("blue", "green", "red")
    assert classes[answer["label_id"]] == tested["label"]
    np.testing.assert_allclose(answer["probabilities"], [float(tested[f"p_{name}"]) for name in classes], atol=1e-4)


def assert_unanswered(answer: dict[str, Any], reason: str) -> None:
    assert reason in answer["error"]
    assert [answer[name] for name in ("label", "label_id", "score", "probabilities")] == [None] * 4


# What is answered


def test_images_in_a_table_are_answered_as_tested(run: Run, cluster: None, tmp_path: Path) -> None:
    images: list[bytes | None] = [content(run, row) for row in run.tested]
    images[3:3] = [NOT_AN_IMAGE, None]
    ids = list(range(len(images)))
    source = table(tmp_path / "source", id=ids, where=[f"place {i}" for i in ids], image=images)
    score(ADDRESS, source, tmp_path / "target", batch_size=8, tracking_uri=run.uri)
    found = answers(tmp_path / "target")
    assert list(found[0]) == ["id", "where", "label", "label_id", "score", "probabilities", "familiarity", "error"]
    assert [(row["id"], row["where"]) for row in found] == [(i, f"place {i}") for i in ids]
    assert_unanswered(found.pop(3), "expected the bytes of an encoded image, found 8 bytes that cannot be read as one")
    assert_unanswered(found.pop(3), "image: expected one, found null")
    for answer, tested in zip(found, run.tested, strict=True):
        assert_as_tested(answer, tested)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"], "nothing else is left behind"


class Pipe:
    """A file that holds its reader until it is given something: so a worker is caught in the middle of its batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    def open(self) -> tuple[int, int]:
        """Wait for a reader; the descriptor of the pipe, and the reader's process."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            try:
                pipe = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # no reader yet
                time.sleep(0.05)
                continue
            while time.monotonic() < until:
                # (Other processes come and go meanwhile: asked one by one, some would be gone.)
                for process in psutil.process_iter(["cmdline"]):
                    if "MapBatches" in " ".join(process.info["cmdline"] or []) and self._is_open_in(process.pid):
                        return pipe, process.pid
        raise AssertionError("no worker came to read")

    def kill_reader(self) -> int:
        pipe, reader = self.open()
        os.kill(reader, signal.SIGKILL)
        os.close(pipe)
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(reader).wait(timeout=10)
        return reader

    def give(self, data: bytes) -> int:
        pipe, reader = self.open()
        os.write(pipe, data)
        os.close(pipe)
        return reader

    def _is_open_in(self, process: int) -> bool:
        try:
            return any(os.readlink(link) == str(self.path) for link in Path(f"/proc/{process}/fd").iterdir())
        except OSError:  # it is gone, or has closed it
            return False


@pytest.fixture
def reading_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that read from a pipe, which by themselves they refuse, and are held by it."""

    class Held(Worker):  # not at the top of a file that the processes of Ray may not find
        def _content(self, value: Any) -> Any:
            path = self._root / value
            return path.read_bytes() if path.is_fifo() else super()._content(value)

    monkeypatch.setattr(scoring, "Worker", Held)


def or_give_up(work: Callable[[], Any]) -> Any:
    """Let the job, which waits for the pipe, end where something goes wrong beside it."""
    try:
        return work()
    except BaseException:
        traceback.print_exc()  # the job will end with another error
        ray.shutdown()
        raise


def test_a_killed_worker_is_replaced_by_one_of_the_same_version_and_nothing_is_lost_or_doubled(
    run: Run, cluster: None, reading_pipes: None, tmp_path: Path
) -> None:
    assert run.register("colours", "--threshold=0.999999") == 0  # would give no labels
    tested = [run.tested[i % len(run.tested)] for i in range(300)]
    paths = [row["path"] for row in tested]
    pipe = Pipe(tmp_path / "pipe")
    paths[100] = str(pipe.path)
    paths[200] = "nowhere.png"
    source = table(tmp_path / "source", id=list(range(300)), path=paths)

    def kill_and_go_on() -> tuple[int, int]:
        killed = pipe.kill_reader()
        run.client.set_registered_model_alias("colours", "champion", "2")
        return killed, pipe.give(content(run, tested[100]))

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(or_give_up, kill_and_go_on)
        try:
            score(ADDRESS, source, tmp_path / "target", root=run.images, batch_size=16, tracking_uri=run.uri)
        finally:
            run.client.set_registered_model_alias("colours", "champion", "1")
    killed, replacement = beside.result()
    assert killed != replacement
    found = answers(tmp_path / "target")
    assert [row["id"] for row in found] == list(range(300))
    assert [row["path"] for row in found] == paths
    assert_unanswered(found[200], "path: [Errno 2] No such file or directory")
    for i, row in enumerate(tested):
        if i != 200:
            assert_as_tested(found[i], row)


def test_what_kills_its_worker_every_time_ends_the_job_and_leaves_nothing(
    run: Run, cluster: None, reading_pipes: None, tmp_path: Path
) -> None:
    pipe = Pipe(tmp_path / "pipe")
    source = table(tmp_path / "source", id=[0, 1], path=[run.tested[0]["path"], str(pipe.path)])
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(or_give_up, lambda: [pipe.kill_reader() for _ in range(4)])
        with pytest.raises(ray.exceptions.RayError):
            score(ADDRESS, source, tmp_path / "target", root=run.images, workers=1, tracking_uri=run.uri)
    assert len(set(beside.result())) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "source"]


def test_an_alias_is_looked_up_once(run: Run) -> None:
    pinned, uri = pin(ADDRESS, run.uri, "address")
    assert pinned == "models:/colours/1"
    run.client.delete_registered_model_alias("colours", "champion")
    try:
        worker = Worker(pinned, uri, "path", run.images)
    finally:
        run.client.set_registered_model_alias("colours", "champion", "1")
    (answer,) = worker(pa.table({"path": [run.tested[0]["path"]]})).to_pylist()
    assert_as_tested(answer, run.tested[0])


@pytest.mark.parametrize("bad", [None, "nowhere.png", ".", "a\0b"], ids=["null", "missing", "a folder", "no name"])
def test_a_file_that_cannot_be_read_is_answered_by_its_reason(run: Run, bad: str | None) -> None:
    worker = Worker("models:/colours/1", run.uri, "path", run.images)
    rows = pa.table({"path": pa.array([bad, run.tested[0]["path"], bad])})
    first, good, last = worker(rows).to_pylist()
    assert_unanswered(first, "path: ")
    assert_as_tested(good, run.tested[0])
    assert_unanswered(last, "path: ")


def test_a_pipe_among_the_paths_does_not_hold_a_worker(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (answer,) = Worker("models:/colours/1", run.uri, "path", tmp_path)(pa.table({"path": ["pipe"]})).to_pylist()
    assert_unanswered(answer, "path: it is no regular file")


def test_a_batch_of_which_nothing_can_be_read_has_the_columns_of_any_other(run: Run) -> None:
    worker = Worker("models:/colours/1", run.uri, "image", run.images)
    unread = worker(pa.table({"image": [NOT_AN_IMAGE]}))
    assert unread.schema == worker(pa.table({"image": [content(run, run.tested[0])]})).schema
    assert unread.num_rows == 1


def test_several_classes_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ImageClassifier()
    model.bundle = SimpleNamespace(
        classes=["a", "b", "c"],
        multi_label=True,
        predict_each=lambda images: (
            Answers(np.array([[0.7, 0.5, 0.1], [0.1, 0.2, 0.3]], np.float32), None),
            [None, "broken", None],
        ),
    )
    monkeypatch.setattr(scoring, "load", lambda *_: model)
    both, bad, none = Worker("", "", "image", Path())(pa.table({"image": [b"1", b"2", b"3"]})).to_pylist()
    assert list(both) == ["labels", "probabilities", "familiarity", "error"]
    assert (both["labels"], both["error"]) == (["a", "b"], None)
    assert bad == {"labels": None, "probabilities": None, "familiarity": None, "error": "broken"}
    assert (none["labels"], none["error"]) == ([], None)


@pytest.mark.parametrize("cores", [0, 1])
def test_a_worker_takes_one_thread(cluster: None, cores: int) -> None:
    assert ray.get(ray.remote(num_cpus=cores)(usable_cores).remote()) == 1


@pytest.mark.parametrize(("share", "expected"), [("1", 1), ("0", 1), ("4,2", None), ("", None), ("100000", None)])
def test_a_share_of_the_cores_is_kept_to(monkeypatch: pytest.MonkeyPatch, share: str, expected: int | None) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    there = usable_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", share)
    assert usable_cores() == (there if expected is None else expected)


# What is refused


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"picture": [b"x"]},
            r"expected a column image of .* \(binary\) or path of .* found picture \(binary\)",
        ),
        ({"image": ["x.png"]}, r"found image \(string\)"),
        ({"image": [b"x"], "label": ["blue"]}, "called as the answers are, found label; give them other names"),
    ],
    ids=["another column", "another type", "a column that would be overwritten"],
)
def test_a_table_of_another_kind_is_refused(
    run: Run, cluster: None, tmp_path: Path, columns: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        score(ADDRESS, table(tmp_path / "source", **columns), tmp_path / "target", tracking_uri=run.uri)
    assert not (tmp_path / "target").exists()


def test_a_source_that_is_not_there_is_refused(run: Run, cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="source: expected a Parquet file or a folder of them, found none at"):
        score(ADDRESS, tmp_path / "nowhere", tmp_path / "target", tracking_uri=run.uri)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("models:/colour@champion", "found none; did you mean colours"),
        ("models:/colours@hero", "its aliases challenger, champion"),
        ("models:/colours/99", "found none; its versions are 1"),
        ("colours", "address: expected models:/<name>@<alias> or models:/<name>/<version>, found 'colours'"),
    ],
)
def test_a_model_that_is_not_there_is_refused(run: Run, tmp_path: Path, address: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        score(address, tmp_path, tmp_path / "target", tracking_uri=run.uri)


def test_a_version_that_cannot_tell_which_image_is_bad_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow.pyfunc.load_model", lambda _: SimpleNamespace(unwrap_python_model=object))
    with pytest.raises(UserError, match="found a version registered without that; register its run anew"):
        score(ADDRESS, tmp_path, tmp_path / "target", tracking_uri=run.uri)


def test_a_target_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    for target, words in ((tmp_path, "found files in"), (tmp_path / "kept.txt", "found a file at")):
        with pytest.raises(UserError, match=f"target: expected a new or empty folder, {words}"):
            score(ADDRESS, tmp_path, target)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(UserError, match=r'pip install "transfer-pipeline\[ray\]"'):
        score(ADDRESS, tmp_path, tmp_path / "target")
