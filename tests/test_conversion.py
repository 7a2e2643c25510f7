"""Images are written as chunks, and what was not written in this way is not read."""

import json
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import pytest
from litdata.streaming.writer import BinaryWriter

from datamodules.conversion import convert
from datamodules.storage import FileStorage
from datamodules.streaming import read_stream
from datamodules.table import Listing
from tests.streams import complaint, noise, pictures, same_images

# Conversion


def test_images_and_all_that_is_known_of_them_are_kept(tmp_path):
    rng = random.Random(0)
    listing = pictures(
        120,
        labels=[rng.choice(["a|b", "c", "", "ü"]) for _ in range(120)],
        given=[rng.choice(["train", "val", "test", None]) for _ in range(120)],
        groups=[rng.choice(["", "p1", "p2"]) for _ in range(120)],
        weights=[rng.random() for _ in range(120)],
        strata=[rng.choice(["x", "y"]) for _ in range(120)],
        separator="|",
        metadata={"camera": [f"camera {row % 7}" for row in range(120)], "path": [str(row) for row in range(120)]},
    )
    convert(listing, str(tmp_path / "out"), chunk_megabytes=1)
    streamed = read_stream(str(tmp_path / "out"))
    assert same_images(streamed, listing)
    rows = [listing.paths.index(path) for path in streamed.paths]
    assert streamed.metadata == {name: [column[row] for row in rows] for name, column in listing.metadata.items()}
    assert streamed.paths != listing.paths
    for row, path in enumerate(streamed.paths):
        assert streamed.storage.size(row) == listing.storage.size(listing.paths.index(path))
        assert path in streamed.storage.describe(row)
    assert streamed.storage.location == str(tmp_path / "out")


def test_little_is_known_of_the_images(tmp_path):
    listing = pictures(10, given=[None] * 10)
    convert(listing, str(tmp_path / "out"))
    streamed = read_stream(str(tmp_path / "out"))
    assert same_images(streamed, listing)
    assert (streamed.groups, streamed.weights, streamed.strata, streamed.separator) == (None, None, None, None)
    assert streamed.metadata is None


def test_litdata_reads_the_same_images(tmp_path):
    convert(pictures(80, given=["train"] * 50 + ["val"] * 30), str(tmp_path), chunk_megabytes=1)
    streamed = read_stream(str(tmp_path))
    files = {*streamed.storage.layout.files, "index.json", "manifest.parquet"}
    assert {file.name for file in tmp_path.iterdir()} == files
    theirs = litdata.StreamingDataset(str(tmp_path))
    assert len(theirs) == 80
    assert [theirs[row] for row in range(80)] == [streamed.storage.source(row) for row in range(80)]


def test_files_are_converted(tmp_path):
    images = noise(20)
    (tmp_path / "in").mkdir()
    names = [f"{row}.png" for row in range(20)]
    for row, name in enumerate(names):
        (tmp_path / "in" / name).write_bytes(images.source(row))
    listing = Listing(FileStorage(tmp_path / "in", names), names, ["x"] * 20, [None] * 20)
    convert(listing, str(tmp_path / "new" / "out"))
    assert same_images(read_stream(str(tmp_path / "new" / "out")), listing)
    (tmp_path / "in" / "7.png").unlink()
    message = complaint(lambda: convert(listing, str(tmp_path / "other")))
    assert message.startswith(str(tmp_path / "in" / "7.png"))
    assert "expected converted data" not in message
    assert "no manifest.parquet" in complaint(lambda: read_stream(str(tmp_path / "other")))


def test_a_chunk_is_a_sample_of_one_split(tmp_path):
    """Images come sorted by class; chunks must not be."""
    given = [("train", "train", "val", "test")[row % 4] for row in range(400)]
    convert(pictures(400, given=given, largest=30_000), str(tmp_path), chunk_megabytes=1)
    listing = read_stream(str(tmp_path))
    blocks = listing.storage.blocks
    assert (np.diff(blocks) >= 0).all()
    splits_of = {
        block: {split for split, where in zip(listing.given, blocks, strict=True) if where == block} for block in blocks
    }
    assert [len(splits) for splits in splits_of.values()] == [1] * (blocks[-1] + 1)
    for block in range(3):
        labels = [label for label, where in zip(listing.labels, blocks, strict=True) if where == block]
        assert len(set(labels)) == 4


def test_the_order_depends_on_the_seed_alone(tmp_path):
    listing = pictures(60)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(listing, str(tmp_path / name), chunk_megabytes=1, seed=seed)
    a, b, c = ((tmp_path / name / "chunk-0-0.bin").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert read_stream(str(tmp_path / "a")).paths == read_stream(str(tmp_path / "b")).paths


def test_sizes_of_chunks(tmp_path):
    listing = pictures(100)
    listing.storage.encoded[3] = b"a very large image" * 100_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(listing, str(tmp_path), chunk_megabytes=1)
    sizes = sorted(file.stat().st_size for file in tmp_path.glob("*.bin"))
    assert sizes[-1] > 1_800_000
    assert all(900_000 < size < 1_070_000 for size in sizes[1:-1])
    assert same_images(read_stream(str(tmp_path)), listing)


@pytest.mark.parametrize("megabytes", [0, 4001])
def test_chunks_of_no_use(tmp_path, megabytes):
    assert f"found {megabytes}" in complaint(lambda: convert(pictures(1), str(tmp_path), chunk_megabytes=megabytes))


def test_progress_is_told(tmp_path):
    told: list[tuple[int, int]] = []
    convert(pictures(30), str(tmp_path), progress=lambda *numbers: told.append(numbers))
    assert told == [(number, 30) for number in range(1, 31)]


def test_nothing_is_printed_left_running_or_drawn(tmp_path, capfd):
    state, legacy, threads = random.getstate(), np.random.get_state()[1].copy(), threading.active_count()
    convert(pictures(50), str(tmp_path), chunk_megabytes=1)
    storage = read_stream(str(tmp_path)).storage
    assert storage.source(0)
    assert capfd.readouterr() == ("", "")
    assert threading.active_count() == threads
    assert random.getstate() == state
    assert (np.random.get_state()[1] == legacy).all()


def test_a_place_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "nothing there yet" in complaint(lambda: convert(pictures(3), str(tmp_path)))
    assert "expected a place" in complaint(lambda: convert(pictures(3), str(tmp_path / "notes.txt")))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("when", [60, 200])
def test_a_conversion_that_was_killed_is_not_taken_for_a_whole_one(tmp_path, when):
    """Even when it had only the manifest left to write."""

    def die(done: int, _: int) -> None:
        if done == when:
            os.kill(os.getpid(), signal.SIGKILL)

    process = get_context("fork").Process(target=convert, args=(pictures(200), str(tmp_path), 1, 0, die))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob("*.bin"))
    assert "no manifest.parquet" in complaint(lambda: read_stream(str(tmp_path)))
    assert "interrupted" in complaint(lambda: convert(pictures(3), str(tmp_path)))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "index.json").read_text())
    change(content)
    (folder / "index.json").write_text(json.dumps(content))


# What is not converted data


class Trap:
    """Pickled, it writes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.file, "w")


def test_pickled_items_are_refused_and_not_read(tmp_path):
    convert(pictures(1), str(tmp_path / "out"))
    writer = BinaryWriter(str(tmp_path / "bad"), chunk_bytes=1_000_000)
    writer.add_item(0, Trap(tmp_path / "sprung"))
    writer.done()
    index = json.loads(Path(writer.write_chunks_index()).read_text())
    assert index["config"]["data_format"] == ["pickle"]
    for file in (tmp_path / "bad").glob("*.bin"):
        file.replace(tmp_path / "out" / file.name)
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    assert "pickle" in complaint(lambda: read_stream(str(tmp_path / "out")))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda content: content["config"].update(data_format=["bytes", "int"]), "items of ['bytes', 'int']"),
        (lambda content: content["config"].update(compression="zstd"), "zstd"),
        (lambda content: content["config"].update(encryption={"algorithm": "fernet"}), "fernet"),
        (lambda content: content["chunks"].pop(), "different images"),
        (lambda content: content["chunks"][0].update(chunk_bytes=7), "different images"),
        (lambda content: content["chunks"][0].update(filename="../other.bin"), "different images"),
        (lambda content: content["chunks"][0].update(filename="/etc/passwd"), "different images"),
        (lambda content: content["chunks"][0].update(chunk_size=-1), "cannot be read"),
        (lambda content: content["chunks"][0].update(chunk_size="many"), "cannot be read"),
        (lambda content: content["chunks"].append(None), "cannot be read"),
        (
            lambda content: content["chunks"].append({"filename": "x.bin", "chunk_size": 0, "chunk_bytes": 8}),
            "different images",
        ),
        (lambda content: content.pop("config"), "cannot be read"),
        (lambda content: content.update(chunks=[]), "different images"),
    ],
)
def test_an_index_of_something_else(tmp_path, change, part):
    convert(pictures(50), str(tmp_path), chunk_megabytes=1)
    edit_index(tmp_path, change)
    message = complaint(lambda: read_stream(str(tmp_path)))
    assert str(tmp_path) in message
    assert part in message
    assert "python -m pipeline convert" in message


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("manifest.parquet", None, "no manifest.parquet"),
        ("manifest.parquet", b"PAR1", "manifest.parquet that cannot be read"),
        ("index.json", None, "no index.json"),
        ("index.json", b"{", "index.json that cannot be read"),
    ],
)
def test_a_file_is_missing_or_damaged(tmp_path, name, content, part):
    convert(pictures(5), str(tmp_path))
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    assert part in complaint(lambda: read_stream(str(tmp_path)))


def test_a_chunk_that_is_cut_short(tmp_path):
    convert(pictures(5), str(tmp_path))
    storage = read_stream(str(tmp_path)).storage
    file = tmp_path / "chunk-0-0.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match="ends too early"):
        storage.source(4)
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        storage.source(4)


@pytest.mark.parametrize(
    "address", ["gs://bucket/folder", "https://host/folder", "s3://bucket", "s3://bucket/", "s3:///x"]
)
def test_addresses_of_other_kinds(address):
    for action in (lambda: read_stream(address), lambda: convert(pictures(1), address)):
        message = complaint(action)
        assert "s3://bucket/folder" in message
        assert f"'{address}'" in message
