"""Digests of contents: which files are read again."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from datamodules import contents
from datamodules.contents import ContentMemo
from datamodules.storage import FileStorage, MemoryStorage, Storage
from tests.cached import LONG_AGO_NS, rewrite

OLD = [b"first", b"other", b"third"]
NEW = [b"FIRST", b"OTHER", b"THIRD"]


@pytest.fixture
def storage(tmp_path: Path) -> FileStorage:
    return written(tmp_path, OLD, LONG_AGO_NS)


def written(folder: Path, texts: Sequence[bytes], mtime_ns: int) -> FileStorage:
    """Files that were last changed at some time."""
    names = [f"größe {number}.png" for number in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        rewrite(folder / name, text, mtime_ns)
    return FileStorage(folder, names)


def digested(storage: Storage, memo: Path, rows: Sequence[int] = (0, 1, 2), threads: int = 1) -> bytes:
    """As a process of its own would."""
    remembered = ContentMemo(memo)
    digests = remembered.digests(storage, rows, threads)
    remembered.save()
    return digests


def expected(texts: Sequence[bytes]) -> bytes:
    return b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)


@pytest.mark.parametrize("threads", [1, 3])
def test_digests_are_of_the_contents_in_order(storage: FileStorage, tmp_path: Path, threads: int) -> None:
    rows = np.random.default_rng(0).integers(0, 3, 1000).tolist()
    for _ in range(2):  # read, then remembered
        assert digested(storage, tmp_path / "memo.npy", rows, threads) == expected([OLD[row] for row in rows])
    assert digested(MemoryStorage(OLD), tmp_path / "memo.npy", rows, threads) == expected([OLD[row] for row in rows])
    assert digested(storage, tmp_path / "memo.npy", []) == b""


def test_a_large_file_is_read_to_its_end(tmp_path: Path) -> None:
    text = np.random.default_rng(0).bytes(1_000_001)
    storage = written(tmp_path, [text, text[:-1] + b"0"], LONG_AGO_NS)
    assert digested(storage, tmp_path / "memo.npy", [0, 1]) == expected([text, text[:-1] + b"0"])


def test_a_file_of_the_same_size_and_time_is_not_read_again(storage: FileStorage, tmp_path: Path) -> None:
    digested(storage, tmp_path / "memo.npy")
    written(tmp_path, NEW, LONG_AGO_NS)
    assert digested(storage, tmp_path / "memo.npy") == expected(OLD)


def test_a_file_of_another_time_is_read_again(storage: FileStorage, tmp_path: Path) -> None:
    digested(storage, tmp_path / "memo.npy")
    written(tmp_path, NEW, LONG_AGO_NS + 1)
    assert digested(storage, tmp_path / "memo.npy") == expected(NEW)
    written(tmp_path, OLD, LONG_AGO_NS + 1)
    assert digested(storage, tmp_path / "memo.npy") == expected(NEW)  # which has been noted


def test_a_file_of_another_size_is_read_again(storage: FileStorage, tmp_path: Path) -> None:
    digested(storage, tmp_path / "memo.npy")
    longer = [text + b"!" for text in OLD]
    written(tmp_path, longer, LONG_AGO_NS)
    assert digested(storage, tmp_path / "memo.npy") == expected(longer)


def test_a_file_changed_a_moment_ago_may_change_again_within_a_tick_of_its_clock(
    storage: FileStorage, tmp_path: Path
) -> None:
    now = time.time_ns()
    written(tmp_path, OLD, now)
    digested(storage, tmp_path / "memo.npy")
    written(tmp_path, NEW, now)
    assert digested(storage, tmp_path / "memo.npy") == expected(NEW)


@pytest.mark.parametrize("damage", ["", "no array", "another array", "cut"])
def test_a_damaged_memo_is_an_empty_one(storage: FileStorage, tmp_path: Path, damage: str) -> None:
    memo = tmp_path / "memo.npy"
    digested(storage, memo)
    if damage == "another array":
        np.save(memo, np.zeros(3))
    else:
        memo.write_bytes(memo.read_bytes()[:-1] if damage == "cut" else damage.encode())
    written(tmp_path, NEW, LONG_AGO_NS)
    assert digested(storage, memo) == expected(NEW)


def test_processes_add_to_one_memo(storage: FileStorage, tmp_path: Path) -> None:
    first, second = ContentMemo(tmp_path / "memo.npy"), ContentMemo(tmp_path / "memo.npy")
    for memo, row in ((first, 0), (second, 1)):
        memo.digests(storage, [row], 1)
    for memo in (first, second):
        memo.save()
    written(tmp_path, NEW, LONG_AGO_NS)
    assert digested(storage, tmp_path / "memo.npy") == expected([*OLD[:2], NEW[2]])


def test_what_was_noted_first_is_forgotten_first(
    storage: FileStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "_MOST_REMEMBERED", 2)
    for row in (2, 0, 1):
        digested(storage, tmp_path / "memo.npy", [row])
    written(tmp_path, NEW, LONG_AGO_NS)
    assert digested(storage, tmp_path / "memo.npy") == expected([*OLD[:2], NEW[2]])


def test_a_name_that_comes_to_lie_elsewhere_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, text in (("here", b"here!"), ("there", b"there")):
        (tmp_path / place).mkdir()
        rewrite(tmp_path / place / "a.png", text, LONG_AGO_NS)
        monkeypatch.chdir(tmp_path / place)
        assert digested(FileStorage(Path(), ["a.png"]), tmp_path / "memo.npy", [0]) == expected([text])
