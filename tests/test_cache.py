"""Decoded images on disk: what comes back, when it is built again, and what is left when something goes wrong."""

import errno
import json
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import cache_entry
from datamodules.cache_folder import CacheFolder
from datamodules.errors import DataError
from datamodules.storage import FileStorage, MemoryStorage
from tests.cached import (
    LONG_AGO_NS,
    RECIPE,
    Decoder,
    assert_holds,
    encoded,
    entries,
    open_cache,
    picture,
    rewrite,
    write_pictures,
)

SHAPES = [(8, 10, 3), (1, 1, 1), (5, 7, 4), (33, 2, 3), (8, 10, 3)]
ROWS = range(len(SHAPES))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def pictures() -> list[np.ndarray]:
    return [picture(seed, shape) for seed, shape in enumerate(SHAPES)]


@pytest.fixture
def storage(tmp_path: Path, pictures: list[np.ndarray]) -> FileStorage:
    return write_pictures(tmp_path / "images", pictures)


# What comes back


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("in_files", [True, False])
def test_images_come_back_as_they_were_prepared(folder: Path, tmp_path: Path, dtype: str, in_files: bool) -> None:
    pictures = [picture(seed, shape, dtype) for seed, shape in enumerate(SHAPES)]
    storage = (
        write_pictures(tmp_path / "images", pictures) if in_files else MemoryStorage([encoded(p) for p in pictures])
    )
    cache, decoded = open_cache(folder, storage, ROWS)
    assert decoded == list(ROWS)
    assert_holds(cache, pictures)
    again, decoded = open_cache(folder, storage, ROWS)
    assert decoded == []
    assert_holds(again, pictures)


def test_positions_follow_the_rows(folder: Path, storage: FileStorage, pictures: list[np.ndarray]) -> None:
    rows = np.array([3, 0, 0, 2])
    assert_holds(open_cache(folder, storage, rows)[0], [pictures[row] for row in rows])


def test_images_are_read_only_aligned_and_survive_the_cache(
    folder: Path, storage: FileStorage, pictures: list[np.ndarray]
) -> None:
    cache, _ = open_cache(folder, storage, ROWS)
    images = [cache.get(position) for position in ROWS]
    del cache
    for image, expected in zip(images, pictures, strict=True):
        assert not image.flags.writeable
        assert image.ctypes.data % 64 == 0
        np.testing.assert_array_equal(image, expected)


def test_foreign_byte_order_and_strided_images_are_kept(folder: Path) -> None:
    pictures = [picture(0, (6, 9, 3), "uint16").astype(">u2"), picture(1, (9, 6, 3), "uint16").transpose(1, 0, 2)]
    storage = MemoryStorage([b"0", b"1"])
    cache, _ = open_cache(folder, storage, [0, 1], prepare=lambda row: pictures[row])
    for position, expected in enumerate(pictures):
        np.testing.assert_array_equal(cache.get(position), expected)
    assert cache.get(0).dtype == np.dtype("uint16")


@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_that_is_none_is_refused(folder: Path, storage: FileStorage, position: int) -> None:
    cache, _ = open_cache(folder, storage, ROWS)
    with pytest.raises(IndexError, match=f"position {position} of 5"):
        cache.get(position)


def test_a_cache_of_no_images(folder: Path, storage: FileStorage) -> None:
    for _ in range(2):
        assert len(open_cache(folder, storage, [])[0]) == 0


def test_threads_keep_the_order_and_few_images_in_memory(folder: Path) -> None:
    count, ahead, written = 60, [], 0
    storage = MemoryStorage([encoded(picture(seed)) for seed in range(count)])
    decoder = Decoder(storage)

    def progress(done: int, total: int) -> None:
        nonlocal written
        assert (done, total) == (written + 1, count)
        written = done
        ahead.append(len(decoder.rows) - done)

    cache, _ = open_cache(folder, storage, range(count), prepare=decoder, progress=progress, threads=3)
    assert_holds(cache, [picture(seed) for seed in range(count)])
    assert written == count
    assert max(ahead) <= 2 * 3 + 1


# Which entry


def test_entries_go_by_contents_and_not_by_names(
    folder: Path, storage: FileStorage, tmp_path: Path, pictures: list[np.ndarray]
) -> None:
    open_cache(folder, storage, ROWS)
    moved = write_pictures(tmp_path / "elsewhere", pictures)
    assert open_cache(folder, moved, ROWS)[1] == []
    assert open_cache(folder, MemoryStorage([encoded(image) for image in pictures]), ROWS)[1] == []
    assert open_cache(folder, moved, ROWS[::-1])[1] == list(ROWS[::-1])


def test_another_recipe_is_another_entry(folder: Path, storage: FileStorage) -> None:
    open_cache(folder, storage, ROWS)
    assert open_cache(folder, storage, ROWS, recipe={**RECIPE, "short_side": 256})[1] == list(ROWS)
    assert len(entries(folder)) == 2
    assert open_cache(folder, storage, ROWS, recipe=dict(reversed(RECIPE.items())))[1] == []


def test_a_changed_file_of_the_same_size_makes_a_new_entry_and_removes_the_old(
    folder: Path, storage: FileStorage, pictures: list[np.ndarray]
) -> None:
    open_cache(folder, storage, ROWS)
    open_cache(folder, storage, [0, 1])  # of the same files, but not stale
    old = set(entries(folder))
    changed = picture(99, SHAPES[2])
    rewrite(storage.source(2), encoded(changed), LONG_AGO_NS + 1)
    cache, decoded = open_cache(folder, storage, ROWS)
    assert decoded == list(ROWS)
    assert_holds(cache, [*pictures[:2], changed, *pictures[3:]])
    assert len(old & set(entries(folder))) == 1
    assert open_cache(folder, storage, [0, 1])[1] == []


def test_other_images_of_the_same_names_do_not_make_an_entry_stale(folder: Path) -> None:
    for place in ("here", "there"):
        storage = MemoryStorage([encoded(picture(len(place)))])
        storage.location = place
        open_cache(folder, storage, [0])
    assert len(entries(folder)) == 2


def test_a_touched_file_is_read_again_and_found_the_same(folder: Path, storage: FileStorage) -> None:
    open_cache(folder, storage, ROWS)
    for row in ROWS:
        os.utime(storage.source(row), ns=(LONG_AGO_NS + row, LONG_AGO_NS + row))
    assert open_cache(folder, storage, ROWS)[1] == []
    assert len(entries(folder)) == 1


def test_files_that_seem_unchanged_are_not_read(folder: Path, storage: FileStorage) -> None:
    open_cache(folder, storage, ROWS)
    for row in ROWS:
        path = storage.source(row)
        rewrite(path, bytes(path.stat().st_size), LONG_AGO_NS)  # to be seen only by reading
    assert open_cache(folder, storage, ROWS)[1] == []


def test_a_changed_image_of_no_file_makes_a_new_entry(folder: Path) -> None:
    storage = MemoryStorage([encoded(picture(0))])
    open_cache(folder, storage, [0])
    storage.encoded[0] = encoded(picture(1))
    assert_holds(open_cache(folder, storage, [0])[0], [picture(1)])
    assert len(entries(folder)) == 1


# Damage


def sealed_again(path: Path, **changes: Any) -> None:
    """The record with other values, and its checksum right."""
    record = {**json.loads(path.read_text())["record"], **changes}
    seal = cache_entry.digest(record, (path.parent / "index.npy").read_bytes())
    path.write_text(json.dumps({"record": record, "seal": seal}))


DAMAGES = {
    "pixels cut": lambda entry: os.truncate(entry / "pixels.bin", (entry / "pixels.bin").stat().st_size - 1),
    "pixels too long": lambda entry: (entry / "pixels.bin").open("ab").write(b"0"),
    "no pixels": lambda entry: (entry / "pixels.bin").unlink(),
    "index cut": lambda entry: os.truncate(entry / "index.npy", 200),
    "index flipped": lambda entry: flip(entry / "index.npy", -1),
    "no index": lambda entry: (entry / "index.npy").unlink(),
    "record cut": lambda entry: os.truncate(entry / "about.json", 30),
    "record flipped": lambda entry: (entry / "about.json").write_text(
        (entry / "about.json").read_text().replace("|u1", "|i1")
    ),
    "record is no record": lambda entry: (entry / "about.json").write_text("[1]"),
    "record is no text": lambda entry: (entry / "about.json").write_bytes(b"\xff\x00"),
    "no record": lambda entry: (entry / "about.json").unlink(),
    "other version": lambda entry: sealed_again(entry / "about.json", version=2),
    "version of other fields": lambda entry: sealed_again(entry / "about.json", version=2, more=1),
    "no lock": lambda entry: (entry / "used").unlink(),
}


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_again(
    folder: Path, storage: FileStorage, pictures: list[np.ndarray], damage: str
) -> None:
    open_cache(folder, storage, ROWS)
    (entry,) = entries(folder)
    DAMAGES[damage](entry)
    cache, decoded = open_cache(folder, storage, ROWS)
    assert decoded == list(ROWS)
    assert_holds(cache, pictures)
    assert entries(folder) == [entry]
    assert open_cache(folder, storage, ROWS)[1] == []


def test_a_record_sealed_again_without_a_change_is_sound(folder: Path, storage: FileStorage) -> None:
    """The damage called another version is the version, and not the way it was made."""
    open_cache(folder, storage, ROWS)
    sealed_again(entries(folder)[0] / "about.json")
    assert open_cache(folder, storage, ROWS)[1] == []


def test_a_flipped_byte_costs_one_image_until_the_cache_is_opened_again(
    folder: Path, storage: FileStorage, pictures: list[np.ndarray]
) -> None:
    open_cache(folder, storage, ROWS)
    flip(entries(folder)[0] / "pixels.bin", 256 + 64 + 5)  # the first images take 240 bytes and 3, each to the next 64
    cache, decoded = open_cache(folder, storage, ROWS)
    assert decoded == []
    for _ in range(2):
        found = [cache.get(position) for position in ROWS]
        assert [image is None for image in found] == [False, False, True, False, False]
    for position in (0, 1, 3, 4):
        np.testing.assert_array_equal(found[position], pictures[position])
    repaired, decoded = open_cache(folder, storage, ROWS)
    assert decoded == list(ROWS)
    assert_holds(repaired, pictures)
    assert cache.get(2) is None  # goes on with the file it has, and
    assert open_cache(folder, storage, ROWS)[1] == []  # does not blame the new one


def test_an_image_is_checked_once_in_a_process(folder: Path, storage: FileStorage, pictures: list[np.ndarray]) -> None:
    cache, _ = open_cache(folder, storage, ROWS)
    assert_holds(cache, pictures)
    with (entries(folder)[0] / "pixels.bin").open("r+b") as file:
        file.write(b"\0")
    assert cache.get(0) is not None
    assert pickle.loads(pickle.dumps(cache)).get(0) is None


def test_a_removal_that_was_cut_short_is_finished(folder: Path, storage: FileStorage) -> None:
    open_cache(folder, storage, [0])
    open_cache(folder, storage, [1])
    for entry in entries(folder):
        entry.rename(entry.with_suffix(".removed"))
    assert open_cache(folder, storage, [0])[1] == [0]
    assert len(entries(folder)) == 1


# What goes wrong


@contextmanager
def as_a_user_without_rights() -> Iterator[None]:
    """Root may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_written_is_a_mistake_to_mend(storage: FileStorage) -> None:
    storage.paths = []  # to be found out before any of the images is read
    with tempfile.TemporaryDirectory() as name:  # below a folder that anyone may enter
        Path(name).chmod(0o555)
        with as_a_user_without_rights(), pytest.raises(DataError, match=rf"^data\.cache: expected a folder .*{name}"):
            open_cache(Path(name), storage, ROWS)
        assert list(Path(name).iterdir()) == []
        Path(name).chmod(0o700)


def test_a_folder_that_is_a_file_is_a_mistake_to_mend(folder: Path, storage: FileStorage) -> None:
    folder.write_text("")
    with pytest.raises(DataError, match=r"^data\.cache: expected a folder"):
        open_cache(folder, storage, ROWS)


def test_a_full_disk_is_a_mistake_to_mend_and_leaves_nothing(
    folder: Path, storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cache_entry, "_write_all", full)
        with pytest.raises(DataError, match=r"^data\.cache: .*No space left.*data\.cache_gigabytes"):
            open_cache(folder, storage, ROWS)
    assert entries(folder) == []
    assert open_cache(folder, storage, ROWS)[1] == list(ROWS)


def test_an_image_that_cannot_be_decoded_is_passed_on_and_nothing_is_left(folder: Path, storage: FileStorage) -> None:
    decoder = Decoder(storage)

    def prepare(row: int) -> np.ndarray:
        if row == 3:
            raise OSError("broken data stream")
        return decoder(row)

    with pytest.raises(OSError, match="broken data stream"):
        open_cache(folder, storage, ROWS, prepare=prepare)
    assert entries(folder) == []


def test_an_absent_file_is_passed_on(folder: Path, storage: FileStorage) -> None:
    storage.source(1).unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.npy"):
        open_cache(folder, storage, ROWS)
    assert entries(folder) == []


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([np.zeros((2, 2), np.uint8)] * 2, "height, width, channels"),
        ([np.zeros((2, 2, 3), np.int64)] * 2, "uint8, uint16, float32"),
        ([np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint16)], "one type"),
    ],
)
def test_other_arrays_are_refused(folder: Path, images: list[np.ndarray], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        open_cache(folder, MemoryStorage([b"0", b"1"]), [0, 1], prepare=lambda row: images[row])
    assert entries(folder) == []


def test_an_image_of_a_removed_cache_stays_readable(
    folder: Path, storage: FileStorage, pictures: list[np.ndarray]
) -> None:
    cache, _ = open_cache(folder, storage, ROWS)
    CacheFolder(folder, 0).remove(entries(folder)[0].name)
    assert_holds(cache, pictures)
    late = pickle.loads(pickle.dumps(cache))
    assert len(late) == len(pictures)
    assert [late.get(position) for position in ROWS] == [None] * len(pictures)


def test_names_in_any_writing(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    storage = write_pictures(tmp_path / "Bilder größer 画像", pictures)
    for _ in range(2):
        cache, decoded = open_cache(tmp_path / "Zwischenspeicher ñ 缓存" / "tief", storage, ROWS)
        assert_holds(cache, pictures)
    assert decoded == []
