"""What a sample looks like, and in which order samples come: a function of seed, epoch and index alone."""

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from datamodules import DataError
from datamodules.dataset import EpochSampler
from tests.images import attach, epoch_of, folder_module, numbered, save

# What a sample looks like depends on (seed, epoch, index) alone


def pictures(batches: Iterable[dict[str, torch.Tensor]]) -> dict[int, bytes]:
    found = {}
    for batch in batches:
        for image, index in zip(batch["image"], batch["index"].tolist(), strict=True):
            found[index] = image.numpy().tobytes()
    return found


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """A folder in which all images are the same picture: what differs is the augmentation's doing."""
    for label in ("cat", "dog"):
        for i in range(12):
            save(tmp_path / "twins" / label / f"{i:03d}.png")
    return tmp_path / "twins"


def test_training_images_and_their_order_do_not_depend_on_the_number_of_workers(image_folder):
    root = image_folder({"cat": 12, "dog": 12})
    reference = folder_module(root, seed=7, train_transforms="strong")
    epochs = {epoch: epoch_of(reference, epoch) for epoch in (0, 1)}
    for workers in (1, 2):
        module = folder_module(root, seed=7, train_transforms="strong", num_workers=workers)
        loader = module.train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            random.seed(workers)
            torch.manual_seed(workers)
            batches = list(loader)
            assert len(batches) == len(epochs[epoch]) == 4
            for found, expected in zip(batches, epochs[epoch], strict=True):
                for key in ("index", "target", "image"):
                    assert torch.equal(found[key], expected[key]), (workers, epoch, key)


@pytest.mark.parametrize("replicas", [2, 3])
def test_training_images_do_not_depend_on_the_number_of_ranks(image_folder, replicas):
    root = image_folder({"cat": 12, "dog": 12})
    dataset = folder_module(root, seed=7, train_transforms="strong").dataset("train")
    for epoch in (0, 3):
        alone = EpochSampler(dataset, 1, 0, training=True, seed=7)
        alone.set_epoch(epoch)
        expected = {key: dataset[key]["image"] for key in alone}
        shared = {}
        for rank in range(replicas):
            sampler = EpochSampler(dataset, replicas, rank, training=True, seed=7)
            sampler.set_epoch(epoch)
            shared |= {key: dataset[key]["image"] for key in sampler}
        assert sorted(shared) == sorted(expected)
        assert all(torch.equal(shared[key], image) for key, image in expected.items())


def test_a_rank_reads_its_own_share(image_folder):
    root = image_folder({"cat": 12, "dog": 12})
    whole = pictures(epoch_of(folder_module(root, batch_size=2), 0))
    shares = [
        pictures(epoch_of(attach(folder_module(root, batch_size=2), TrainerFn.FITTING, 2, rank), 0)) for rank in (0, 1)
    ]
    assert len(shares[0]) == len(shares[1]) == len(whole) / 2
    assert not set(shares[0]) & set(shares[1])
    assert shares[0] | shares[1] == whole


def test_fewer_images_than_ranks_are_refused(image_folder):
    root = image_folder({"train/cat": 4, "train/dog": 4, "val/cat": 1, "test/cat": 3})
    module = attach(folder_module(root), TrainerFn.FITTING, world_size=2)
    assert len(module.train_dataloader().sampler) == 4
    with pytest.raises(DataError, match=r"one image of val for each of 2 processes, found 1"):
        module.val_dataloader()


def test_every_epoch_every_seed_and_every_index_look_different(twins):
    def look(seed: int, epoch: int) -> dict[int, bytes]:
        return pictures(epoch_of(folder_module(twins, seed=seed, train_transforms="strong", batch_size=2), epoch))

    first = look(7, 0)
    assert look(7, 0) == first
    assert len(set(first.values())) == len(first), "one picture was augmented alike at two indices"
    for other in (look(7, 1), look(8, 0)):
        assert sorted(other) == sorted(first)
        assert all(other[index] != first[index] for index in first)


def test_the_order_of_training_follows_seed_and_epoch(image_folder):
    root = image_folder({"cat": 12, "dog": 12})

    def order(seed: int, epoch: int) -> list[int]:
        batches = epoch_of(folder_module(root, seed=seed, batch_size=2), epoch)
        return torch.cat([batch["index"] for batch in batches]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sorted(order(0, 0)) == sorted(order(0, 1)) == list(range(len(order(0, 0))))


# The sampler


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 12, 17])
def test_training_gives_every_rank_equally_many_samples_and_leaves_none_out(length, replicas):
    shares = []
    for rank in range(replicas):
        sampler = EpochSampler(numbered(length), replicas, rank, training=True, seed=0)
        sampler.set_epoch(4)
        share = list(sampler)
        assert len(share) == len(sampler) == -(-length // replicas)
        assert {(epoch, repeat) for epoch, _, repeat in share} == {(4, 0)}
        shares.append([index for _, index, _ in share])
    counts = Counter(index for share in shares for index in share)
    assert sorted(counts) == list(range(length))
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 12, 17])
def test_evaluation_covers_every_sample_exactly_once(length, replicas):
    seen: list[int] = []
    for rank in range(replicas):
        sampler = EpochSampler(numbered(length), replicas, rank, training=False, seed=0)
        share = [index for _, index, _ in sampler]
        assert len(share) == len(sampler)
        assert share == sorted(share)
        seen += share
    assert sorted(seen) == list(range(length))
