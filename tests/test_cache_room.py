"""The bound on a folder of decoded images: what is kept, what is removed for it, and what is spared."""

import os
from pathlib import Path

import pytest

from datamodules.cache import ImageCache
from datamodules.cache_folder import CacheFolder
from datamodules.locks import waiting_lock
from datamodules.storage import MemoryStorage
from tests.cached import (
    LONG_AGO_NS,
    assert_holds,
    encoded,
    entries,
    folder_size,
    open_cache,
    picture,
    write_pictures,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_images_are_kept_in_order_until_the_bound(folder: Path) -> None:
    pictures = [picture(seed, (64, 64, 3)) for seed in range(8)]
    storage = MemoryStorage([encoded(image) for image in pictures])
    limit = 5 * pictures[0].nbytes + 5000
    kept: list[int] = []
    cache, _ = open_cache(folder, storage, range(8), limit_bytes=limit, progress=lambda done, _: kept.append(done))
    assert_holds(cache, pictures[:5])
    assert kept == [1, 2, 3, 4, 5]
    assert [cache.get(position) for position in (5, 6, 7)] == [None] * 3
    assert folder_size(folder) <= limit
    assert open_cache(folder, storage, range(8), limit_bytes=limit)[1] == []


def test_a_bound_that_was_moved_builds_again(folder: Path) -> None:
    pictures = [picture(seed, (64, 64, 3)) for seed in range(8)]
    storage = MemoryStorage([encoded(image) for image in pictures])
    for kept in (3, 7, 2):
        limit = kept * pictures[0].nbytes + 5000
        cache, _ = open_cache(folder, storage, range(8), limit_bytes=limit)
        assert_holds(cache, pictures[:kept])
        assert folder_size(folder) <= limit


@pytest.mark.parametrize("limit", [0, 100])
def test_a_bound_below_one_image_keeps_none(folder: Path, limit: int) -> None:
    storage = MemoryStorage([encoded(picture(seed)) for seed in range(3)])
    for _ in range(2):
        cache, _ = open_cache(folder, storage, range(3), limit_bytes=limit)
        assert len(cache) == 0
        assert cache.get(2) is None


def test_the_memo_counts(folder: Path, tmp_path: Path) -> None:
    storage = write_pictures(tmp_path / "images", [picture(seed) for seed in range(200)])
    cache, _ = open_cache(folder, storage, range(200), limit_bytes=40_000)
    assert 0 < len(cache) < 200
    assert folder_size(folder) <= 40_000


def opened_set(folder: Path, seed: int, images: int = 3, limit_images: int = 10) -> tuple[ImageCache, bool]:
    """A cache of some images of 12 KiB under a bound of so many, and whether it was built for it."""
    storage = MemoryStorage([encoded(picture(100 * seed + number, (64, 64, 3))) for number in range(images)])
    storage.location = str(seed)
    cache, decoded = open_cache(folder, storage, range(images), limit_bytes=limit_images * 12288 + 3 * 4400)
    return cache, bool(decoded)


def make_last_used(folder: Path, order: list[Path]) -> None:
    for number, entry in enumerate(order):
        os.utime(entry / "used", ns=(LONG_AGO_NS + number,) * 2)


def named(folder: Path, seed: int) -> Path:
    """The entry that a new set makes."""
    before = set(entries(folder)) if folder.exists() else set()
    opened_set(folder, seed)
    (made,) = set(entries(folder)) - before
    return made


@pytest.mark.parametrize("oldest", range(3))
def test_the_least_recently_used_entries_make_room(folder: Path, oldest: int) -> None:
    made = [named(folder, seed) for seed in range(3)]
    make_last_used(folder, made[oldest:] + made[:oldest])
    opened_set(folder, 4)
    assert set(made) - set(entries(folder)) == {made[oldest]}


def test_opening_is_using(folder: Path) -> None:
    first, second, third = (named(folder, seed) for seed in range(3))
    make_last_used(folder, [first, second, third])
    assert not opened_set(folder, 0)[1]
    opened_set(folder, 4)
    assert {first, third} < set(entries(folder))
    assert second not in entries(folder)


def test_entries_in_use_are_spared_and_given_up_later(folder: Path) -> None:
    in_use = [opened_set(folder, seed)[0] for seed in range(3)]
    cache, _ = opened_set(folder, 4)
    assert len(entries(folder)) == 4
    assert len(cache) == 1  # of three
    assert not opened_set(folder, 4)[1]  # nothing has changed
    del in_use
    cache, built = opened_set(folder, 4)
    assert built
    assert len(cache) == 3
    assert len(entries(folder)) == 3


def test_only_an_entry_that_is_neither_read_nor_built_is_evicted(folder: Path) -> None:
    key = named(folder, 0).name
    place = CacheFolder(folder, 0)
    reader, _ = opened_set(folder, 0)
    assert not place.evict(key)
    del reader
    with waiting_lock(place.lock(key)):
        assert not place.evict(key)
    assert place.evict(key)
    assert not place.evict(key)
    assert entries(folder) == []


def test_a_lowered_bound_removes_others_at_once(folder: Path) -> None:
    for seed in range(3):
        opened_set(folder, seed)
    assert not opened_set(folder, 2, limit_images=3)[1]
    assert len(entries(folder)) == 1


def test_what_is_not_ours_stays_and_does_not_count(folder: Path) -> None:
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "big.bin").write_bytes(bytes(200_000))
    (folder / ("0" * 32 + ".txt")).write_bytes(bytes(200_000))
    for seed in range(5):
        assert len(opened_set(folder, seed)[0]) == 3
    assert (folder / "photos" / "big.bin").stat().st_size == 200_000
    assert (folder / ("0" * 32 + ".txt")).stat().st_size == 200_000
