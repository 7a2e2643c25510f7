"""Images in chunks, read from an S3 server on this machine."""

import hashlib
import io
import itertools
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from moto.server import ThreadedMotoServer
from PIL import Image

from datamodules import StreamingDataModule, objects
from datamodules.conversion import convert
from datamodules.preprocessing import Preprocessing
from datamodules.sampling import chunkwise_order
from datamodules.storage import MemoryStorage, Storage
from datamodules.streaming import read_stream
from datamodules.table import Listing
from pipeline.planning.facts import _short_side
from pipeline.planning.timing import _reading
from tests.streams import complaint, pictures, same_images

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server on this machine."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket, which every AWS tool would find by the environment."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    name = f"pictures-{next(_numbers)}"
    s3().create_bucket(Bucket=name)
    return name


def s3() -> Any:
    return objects._client(os.getpid())


class Rows(torch.utils.data.Dataset):
    """Digests of images, for reading processes."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def __len__(self) -> int:
        return len(self.storage.names)

    def __getitem__(self, row: int) -> str:
        return hashlib.sha256(self.storage.source(row)).hexdigest()


def digests(storage: Storage, order: list[int], workers: int) -> list[str]:
    loader = torch.utils.data.DataLoader(
        Rows(storage), batch_size=16, sampler=order, num_workers=workers, collate_fn=list
    )
    return [digest for batch in loader for digest in batch]


def held(folder: Path) -> int:
    """Bytes in the cache at a moment when nothing is added."""
    with FileLock(folder / "room.lock"):
        found = {}
        for file in folder.rglob("*.*"):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue
            found[status.st_ino] = status.st_size
        return sum(found.values())


def test_there_and_back(bucket, tmp_path):
    listing = pictures(60, given=["train", "val"] * 30)
    convert(listing, f"s3://{bucket}/some/where", chunk_megabytes=1)
    for address in (f"s3://{bucket}/some/where", f"s3://{bucket}/some/where/"):
        streamed = read_stream(address, tmp_path / "cache")
        assert streamed.storage.location == f"s3://{bucket}/some/where"
        assert same_images(streamed, listing)
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == len(streamed.storage.layout.files)
    keys = {item["Key"] for item in s3().list_objects_v2(Bucket=bucket)["Contents"]}
    assert keys == {f"some/where/{name}" for name in (*streamed.storage.layout.files, "index.json", "manifest.parquet")}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_disk_holds_no_more_than_it_may(bucket, tmp_path, workers):
    """Two passes in random order over data four times the cache; every chunk is fetched about once a pass."""
    listing = pictures(400)
    convert(listing, f"s3://{bucket}/set", chunk_megabytes=1)
    whole = read_stream(f"s3://{bucket}/set", tmp_path / "whole").storage
    expected = digests(whole, list(range(400)), workers=0)
    total = int(whole.layout.lengths.sum())
    limit = total // 4
    cache = tmp_path / "cache"
    cache.mkdir()
    storage = read_stream(f"s3://{bucket}/set", cache, limit / 1e9).storage
    assert storage.window == 2
    peaks, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peaks.append(held(cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for epoch in range(2):
        order = chunkwise_order(storage.blocks, 0, epoch, storage.window).tolist()
        assert digests(storage, order, workers) == [expected[row] for row in order]
    stop.set()
    watcher.join()
    peaks.append(held(cache))
    assert limit - 1_100_000 < max(peaks) <= limit


def test_every_chunk_is_fetched_once_in_a_pass(bucket, tmp_path, monkeypatch):
    convert(pictures(400), f"s3://{bucket}/set", chunk_megabytes=1)
    listing = read_stream(f"s3://{bucket}/set", tmp_path, 0.005)
    storage = listing.storage
    fetched: list[str] = []
    download = objects.download
    monkeypatch.setattr("datamodules.streaming.download", lambda *args: (fetched.append(args[1]), download(*args))[1])
    for row in chunkwise_order(storage.blocks, 0, 0, storage.window):
        storage.source(row)
    assert sorted(fetched) == sorted(storage.layout.files)
    fetched.clear()
    for row in range(400):
        storage.source(row)
    assert len(fetched) <= len(storage.layout.files)


def test_a_storage_can_be_sent_to_other_processes(bucket, tmp_path):
    listing = pictures(200)
    convert(listing, f"s3://{bucket}/set", chunk_megabytes=1)
    storage = read_stream(f"s3://{bucket}/set", tmp_path).storage
    assert storage.source(5)
    sent = pickle.dumps(storage)
    assert len(sent) < 20_000
    code = "import pickle, sys; print(len(pickle.loads(bytes.fromhex(sys.stdin.read())).source(150)))"
    other = subprocess.run([sys.executable, "-c", code], input=sent.hex(), capture_output=True, text=True, check=True)
    assert other.stdout == f"{storage.size(150)}\n"
    assert other.stderr == ""


def test_threads_read_at_the_same_time(bucket, tmp_path):
    listing = pictures(300)
    convert(listing, f"s3://{bucket}/set", chunk_megabytes=1)
    streamed = read_stream(f"s3://{bucket}/set", tmp_path, 0.0025)
    expected = {path: listing.storage.source(row) for row, path in enumerate(listing.paths)}
    rows = np.random.default_rng(0).integers(0, 300, 100).tolist()
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(streamed.storage.source, rows, timeout=60))
    assert got == [expected[streamed.paths[row]] for row in rows]


def test_other_data_at_the_same_address_is_not_mixed_up_with_it(bucket, tmp_path):
    for seed in (0, 1):
        for item in s3().list_objects_v2(Bucket=bucket).get("Contents", []):
            s3().delete_object(Bucket=bucket, Key=item["Key"])
        listing = pictures(20, seed=seed)
        convert(listing, f"s3://{bucket}/set")
        assert same_images(read_stream(f"s3://{bucket}/set", tmp_path), listing)


def test_a_chunk_of_other_images_is_noticed(bucket, tmp_path):
    convert(pictures(40), f"s3://{bucket}/set", chunk_megabytes=1)
    storage = read_stream(f"s3://{bucket}/set", tmp_path).storage
    s3().copy_object(Bucket=bucket, CopySource=f"{bucket}/set/chunk-0-1.bin", Key="set/chunk-0-0.bin")
    with pytest.raises(OSError, match=r"chunk-0-0\.bin holds other images"):
        storage.source(0)
    assert not list(tmp_path.rglob("*.part"))
    s3().delete_object(Bucket=bucket, Key="set/chunk-0-1.bin")
    with pytest.raises(FileNotFoundError, match=r"s3://.*chunk-0-1\.bin"):
        storage.source(39)


def test_a_place_in_a_bucket_that_is_not_empty_is_refused(bucket):
    convert(pictures(3), f"s3://{bucket}/set/one")
    for address in (f"s3://{bucket}/set/one", f"s3://{bucket}/set", f"s3://{bucket}/set/"):
        assert "nothing there yet" in complaint(lambda address=address: convert(pictures(3), address))
    convert(pictures(3), f"s3://{bucket}/set/on")


def test_an_upload_that_fails_is_not_taken_for_a_whole_one(bucket, monkeypatch):
    sent: list[str] = []

    def upload(file: Path, address: str) -> None:
        if len(sent) == 2:
            raise OSError("the line is down")
        sent.append(file.name)
        objects.upload(file, address)

    monkeypatch.setattr("datamodules.conversion.upload", upload)
    message = complaint(lambda: convert(pictures(100), f"s3://{bucket}/set", chunk_megabytes=1))
    assert "the line is down" in message
    assert sent == ["chunk-0-0.bin", "chunk-0-1.bin"]
    assert "no manifest.parquet" in complaint(lambda: read_stream(f"s3://{bucket}/set"))


def test_chunks_that_were_sent_are_not_kept(bucket, monkeypatch):
    """Data larger than the disk can be converted, too."""
    kept: list[int] = []

    def upload(file: Path, address: str) -> None:
        kept.append(len(list(file.parent.glob("*.bin"))))
        objects.upload(file, address)

    monkeypatch.setattr("datamodules.conversion.upload", upload)
    convert(pictures(100), f"s3://{bucket}/set", chunk_megabytes=1)
    assert len(kept) > 4
    assert max(kept) == 1


def test_a_cache_that_is_too_small(bucket, tmp_path):
    convert(pictures(50), f"s3://{bucket}/set", chunk_megabytes=1)
    message = complaint(lambda: read_stream(f"s3://{bucket}/set", tmp_path, 0.0015))
    assert message.startswith("data.cache_gigabytes: expected 0.00")
    assert "found 0.0015;" in message


def test_buckets_that_cannot_be_used(bucket, monkeypatch):
    assert "NoSuchBucket" in complaint(lambda: convert(pictures(1), "s3://another-bucket/set"))
    assert "no manifest.parquet" in complaint(lambda: read_stream("s3://another-bucket/set"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    objects._client.cache_clear()
    for action in (lambda: read_stream(f"s3://{bucket}/set"), lambda: convert(pictures(1), f"s3://{bucket}/set")):
        assert "Could not connect to the endpoint URL" in complaint(action)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    objects._client.cache_clear()
    assert "credentials" in complaint(lambda: read_stream(f"s3://{bucket}/set"))
    objects._client.cache_clear()


def test_packages_that_are_not_installed(bucket, tmp_path, monkeypatch):
    for package, action in (
        ("litdata.streaming.writer", lambda: convert(pictures(1), str(tmp_path / "out"))),
        ("boto3", lambda: read_stream(f"s3://{bucket}/set")),
    ):
        objects._client.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            message = complaint(action)
        assert f"package {package.partition('.')[0]}," in message
        assert 'pip install "transfer-pipeline[streaming]"' in message


def test_a_plan_looks_into_two_chunks_however_many_there_are(bucket, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    encoded = [io.BytesIO() for _ in range(150)]
    for file in encoded:
        Image.fromarray(rng.integers(0, 256, (96, 128, 3), np.uint8)).save(file, "PNG")
    storage = MemoryStorage([file.getvalue() for file in encoded])
    named = {"labels": ["a", "b"] * 75, "given": ["train", "train", "test"] * 50}
    convert(Listing(storage, [f"{row}.png" for row in range(150)], **named), f"s3://{bucket}/set", chunk_megabytes=1)
    fetched: list[str] = []
    download = objects.download
    monkeypatch.setattr("datamodules.streaming.download", lambda *args: (fetched.append(args[1]), download(*args))[1])
    size = Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3, 3)
    data = StreamingDataModule(str(tmp_path / "chunks"), root=f"s3://{bucket}/set", preprocessing=size.to_dict())
    fetched.clear()
    assert _short_side(data) == 96
    assert _reading(data) > 0
    assert 1 <= len(fetched) <= 2 < len(data.table.listing.storage.layout.files)
    places = data.images("train").some(10)
    assert len(set(places.tolist())) == 10
    assert 0 <= places.min() < places.max() < 100
