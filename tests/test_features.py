"""Features of a frozen network: computed once, kept on disk, never wrong."""

import hashlib
import multiprocessing
import os
import time

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.finetuning import features as module
from pipeline.finetuning import room
from pipeline.finetuning.features import FeatureStore, extract_features, network_digest
from pipeline.models.backbones import create_backbone, features, head_name

RECORD = {"backbone": "resnet20", "size": 32}


class Images:
    """Images of noise, and which of them were read and embedded."""

    def __init__(self, count=10, seed=0):
        self.pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 16, 16), np.uint8))
        self.digests = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in self.pixels]
        self.read = []
        self.batches = []
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(768, 7), nn.BatchNorm1d(7))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network[1].reset_parameters()

    def embed(self, batch):
        assert not self.network.training
        assert not torch.is_grad_enabled()
        self.batches.append(len(batch))
        return self.network(batch / 255)

    def batch(self, rows):
        for start in range(0, len(rows), 3):
            part = list(rows[start : start + 3])
            self.read += part
            yield self.pixels[part]

    def expected(self):
        self.network.eval()
        with torch.no_grad():
            return self.network(self.pixels / 255).numpy()

    def extract(self, store, rows=None, **options):
        digests = self.digests if rows is None else [self.digests[row] for row in rows]
        chosen = list(range(len(self.pixels))) if rows is None else list(rows)
        options = {"batch_size": 4, **options}
        return extract_features(
            self.network,
            self.embed,
            lambda asked: self.batch([chosen[row] for row in asked]),
            digests,
            store,
            **options,
        )


@pytest.fixture
def images():
    return Images()


def store_in(folder, network="net", record=RECORD):
    return FeatureStore(folder, network, record)


def files_of(store):
    return sorted(store.folder.glob("*.features"))


def test_features_are_those_of_the_network_and_come_back_bit_for_bit(tmp_path, images):
    first = images.extract(store_in(tmp_path))
    assert first.dtype == np.float32
    assert first.shape == (10, 7)
    assert first == pytest.approx(images.expected(), abs=1e-6)
    images.read.clear()
    again = images.extract(store_in(tmp_path))
    assert images.read == []
    assert np.array_equal(first, again)


def test_only_missing_images_are_read_and_the_order_is_the_callers(tmp_path, images):
    images.extract(store_in(tmp_path), rows=[7, 2, 5])
    assert images.read == [7, 2, 5]
    images.read.clear()
    found = images.extract(store_in(tmp_path), rows=[9, 5, 0, 2, 7])
    assert images.read == [9, 0]
    assert found == pytest.approx(images.expected()[[9, 5, 0, 2, 7]], abs=1e-6)


def test_identical_images_are_computed_once(tmp_path, images):
    found = images.extract(store_in(tmp_path), rows=[1, 1, 4, 1])
    assert images.read == [1, 4]
    assert np.array_equal(found[0], found[3])
    assert not np.array_equal(found[0], found[2])


def test_batches_are_of_one_size_and_companions_make_no_difference(tmp_path):
    network = create_backbone("resnet20", 3).eval()
    images = Images(9)
    mean = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
    sizes = []

    def embed(batch):
        sizes.append(len(batch))
        return features(network, batch / 255 - mean)

    def extract(folder, rows, digests):
        store = store_in(tmp_path / folder)
        return extract_features(
            network, embed, lambda asked: [images.pixels[[rows[r] for r in asked]]], digests, store, batch_size=4
        )

    everything = extract("all", list(range(9)), images.digests)
    backwards = extract("backwards", list(range(9))[::-1], images.digests[::-1])
    alone = np.concatenate([extract(f"alone {row}", [row], [images.digests[row]]) for row in range(9)])
    assert set(sizes) == {4}
    assert np.array_equal(everything, backwards[::-1])
    assert np.array_equal(everything, alone)


@pytest.mark.parametrize(
    "other",
    [{"network": "another"}, {"record": {**RECORD, "size": 64}}, {"record": {**RECORD, "interpolation": "bicubic"}}],
)
def test_other_weights_or_preprocessing_have_features_of_their_own(tmp_path, images, other):
    images.extract(store_in(tmp_path))
    images.read.clear()
    images.extract(store_in(tmp_path, **other))
    assert images.read == list(range(10))


def test_views_are_kept_apart(tmp_path, images):
    store = store_in(tmp_path)
    plain = images.extract(store)
    images.pixels = images.pixels.flip(3)
    assert np.array_equal(images.extract(store), plain)
    mirrored = images.extract(store, view=1)
    assert not np.allclose(mirrored, plain)
    assert np.array_equal(images.extract(store, view=1), mirrored)
    assert np.array_equal(images.extract(store), plain)


@pytest.mark.parametrize("damage", ["cut short", "emptied", "changed", "checksum changed"])
def test_damaged_files_are_noticed_and_made_anew(tmp_path, images, damage):
    expected = images.extract(store_in(tmp_path))
    (file,) = files_of(store_in(tmp_path))
    content = bytearray(file.read_bytes())
    if damage == "cut short":
        content = content[:-5]
    elif damage == "emptied":
        content = content[:0]
    else:
        content[-3 if damage == "changed" else 3] ^= 1
    file.write_bytes(content)
    images.read.clear()
    assert np.array_equal(images.extract(store_in(tmp_path)), expected)
    assert images.read == list(range(10))
    assert not file.exists()
    images.read.clear()
    images.extract(store_in(tmp_path))
    assert images.read == []


def test_files_of_another_network_are_not_believed_wherever_they_lie(tmp_path, images):
    images.extract(store_in(tmp_path, network="another"))
    (file,) = files_of(store_in(tmp_path, network="another"))
    store = store_in(tmp_path)
    store.folder.mkdir()
    file.rename(store.folder / file.name)
    images.read.clear()
    images.extract(store)
    assert images.read == list(range(10))


def test_what_was_done_before_a_kill_is_kept(tmp_path, images, monkeypatch):
    monkeypatch.setattr(module, "_IMAGES_A_FILE", 4)
    usual, calls = images.embed, []

    def dies(batch):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return usual(batch)

    images.embed = dies
    images.network.train()
    with pytest.raises(KeyboardInterrupt):
        images.extract(store_in(tmp_path))
    assert images.network.training
    images.embed = usual
    images.read.clear()
    found = images.extract(store_in(tmp_path))
    assert images.read == [8, 9]
    assert found == pytest.approx(images.expected(), abs=1e-6)


def test_half_written_files_are_passed_over(tmp_path, images):
    store = store_in(tmp_path)
    expected = images.extract(store)
    (file,) = files_of(store)
    file.rename(file.with_suffix(".unfinished"))
    images.read.clear()
    assert np.array_equal(images.extract(store), expected)
    assert images.read == list(range(10))


def test_a_full_disk_is_said_and_leaves_no_litter(tmp_path, images, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; make room"):
        images.extract(store_in(tmp_path))
    assert [path.name for path in store_in(tmp_path).folder.iterdir()] == []


def test_beyond_a_limit_what_was_not_used_for_longest_goes_and_nothing_else(tmp_path, images, monkeypatch):
    def store(number):
        return FeatureStore(tmp_path, f"network {number}", RECORD)

    other = tmp_path / hashlib.sha256(b"such as a run of MLflow's").hexdigest()[:32]
    other.mkdir()
    (other / "meta.yaml").touch()
    os.utime(other, (0, 0))
    for number in range(4):
        images.extract(store(number))
    for number in range(3):  # the fourth has been used today
        os.utime(store(number).folder, (days_ago := time.time() - 86400 * (9 - number), days_ago))
    images.extract(store(0))  # asked for again: of those left the second is now the oldest
    assert len(images.read) == 4 * len(images.digests)
    size = sum(file.stat().st_size for file in store(3).folder.iterdir())
    monkeypatch.setattr(room, "MOST_BYTES", 4 * size)
    images.extract(store(4))
    left = {number for number in range(5) if store(number).folder.exists()}
    assert left == {0, 2, 3, 4}
    monkeypatch.setattr(room, "MOST_BYTES", 0)
    images.extract(store(5))
    assert {number for number in range(6) if store(number).folder.exists()} == {0, 3, 4, 5}
    assert (other / "meta.yaml").exists()


def test_two_processes_at_once(tmp_path):
    def write() -> None:
        store = FeatureStore(tmp_path, "net", {})
        for number in range(60):
            store.write([str(number)], np.full((1, 3), number, np.float32))
            assert all((line == int(image)).all() for image, line in store.read([str(n) for n in range(60)]).items())

    running = [multiprocessing.get_context("fork").Process(target=write) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=120)
    assert [process.exitcode for process in running] == [0, 0]
    found = FeatureStore(tmp_path, "net", {}).read([str(number) for number in range(61)])
    assert sorted(found, key=int) == [str(number) for number in range(60)]
    assert all((line == int(image)).all() for image, line in found.items())


def test_modules_are_left_in_the_mode_that_they_were_in(tmp_path, images):
    images.network.train()
    images.network[2].eval()
    statistics = images.network[2].running_mean.clone()
    images.extract(store_in(tmp_path))
    assert images.network.training
    assert images.network[1].training
    assert not images.network[2].training
    assert torch.equal(images.network[2].running_mean, statistics)


def test_digest_of_the_network_is_of_all_tensors_but_its_head():
    network = create_backbone("resnet20", 3)
    digest = network_digest(network)
    assert network_digest(network) == digest
    nn.init.ones_(network.get_submodule(head_name(network)).weight)
    assert network_digest(network) == digest
    parameter = next(network.parameters())
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-6
    changed = network_digest(network)
    assert changed != digest
    next(buffer for name, buffer in network.named_buffers() if name.endswith("running_var")).add_(1)
    assert network_digest(network) != changed
    copy = create_backbone("resnet20", 8)
    copy.load_state_dict(
        {n: t for n, t in network.state_dict().items() if not n.startswith(head_name(network))}, strict=False
    )
    assert network_digest(copy.to(memory_format=torch.channels_last)) == network_digest(network)
    assert network_digest(copy.half()) != network_digest(network)


def test_progress_counts_all_images(tmp_path, images):
    calls = []
    images.extract(store_in(tmp_path), rows=[0, 1, 2])
    images.extract(store_in(tmp_path), progress=lambda *call: calls.append(call))
    assert calls == [(3, 10), (7, 10), (10, 10)]


def test_no_images_are_no_work(tmp_path, images):
    assert images.extract(store_in(tmp_path), rows=[]).shape == (0, 0)
    assert images.batches == []


def test_mistakes_have_answers(tmp_path, images):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"expected to keep them in '.*', found Not a directory"):
        images.extract(store_in(tmp_path / "file"))
    with pytest.raises(ValueError, match="expected 10 images from read_images, found 3"):
        extract_features(
            images.network, images.embed, lambda rows: [images.pixels[:3]], images.digests, store_in(tmp_path)
        )
    with pytest.raises(ValueError, match=r"shape \(32, F\) from embed, found \(32, 3, 16, 16\)"):
        extract_features(images.network, lambda batch: batch, images.batch, images.digests, store_in(tmp_path / "b"))
    with pytest.raises(UserError, match="expected finite numbers"):
        extract_features(
            images.network,
            lambda batch: images.embed(batch) / 0,
            images.batch,
            images.digests,
            store_in(tmp_path / "c"),
        )
