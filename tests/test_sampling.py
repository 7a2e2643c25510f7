"""Which images an epoch has: every class equally often where that is asked for, the same for all ranks."""

from collections import Counter

import numpy as np
import pytest
import torch

from datamodules.sampling import EpochSampler, class_balance, draw_evenly
from tests.images import epoch_of, folder_module, numbered


def skewed(counts: tuple[int, ...]) -> np.ndarray:
    labels = [(number,) for number, count in enumerate(counts) for _ in range(count)]
    return class_balance(labels, len(counts))


@pytest.mark.parametrize("counts", [(90, 10), (50, 30, 15, 5), (1, 99), (7, 7)])
def test_classes_are_drawn_equally_often(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    sampler = EpochSampler(numbered(len(labels)), 1, 0, training=True, seed=0, chances=skewed(counts))
    for epoch in range(5):
        sampler.set_epoch(epoch)
        drawn = [index for _, index, _ in sampler]
        assert len(drawn) == len(labels)
        found = Counter(labels[drawn].tolist())
        for number, count in enumerate(counts):
            assert abs(found[number] - len(labels) / len(counts)) <= 1
            each = Counter(index for index in drawn if labels[index] == number)
            due = len(labels) / len(counts) / count  # draws of each image of the class
            assert set(each.values()) <= {int(np.floor(due)), int(np.ceil(due))}


def test_repeats_are_counted_and_look_different(image_folder) -> None:
    root = image_folder({"train/cat": 2, "train/dog": 14, "val/cat": 1, "test/cat": 1})
    module = folder_module(root, imbalance="balanced_sampling", batch_size=16)
    (batch,) = epoch_of(module, 0)
    cats = [i for i, target in enumerate(batch["target"].tolist()) if target == 0]
    assert len(cats) == 8
    by_image: dict[int, list[bytes]] = {}
    for i in cats:
        by_image.setdefault(int(batch["index"][i]), []).append(batch["image"][i].numpy().tobytes())
    assert sorted(by_image) == [0, 1]
    for pictures in by_image.values():
        assert len(set(pictures)) == len(pictures) == 4, "the same picture came twice in an epoch"


def test_balanced_pictures_do_not_depend_on_workers_or_ranks(image_folder) -> None:
    root = image_folder({"train/cat": 3, "train/dog": 21, "val/cat": 1, "test/cat": 1})
    settings = {"imbalance": "balanced_sampling", "seed": 2, "train_transforms": "strong"}
    expected = epoch_of(folder_module(root, **settings), 1)
    found = epoch_of(folder_module(root, **settings, num_workers=2), 1)
    assert len(found) == len(expected) == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours["image"], theirs["image"])
    module = folder_module(root, **settings)
    loader = module.train_dataloader()
    keys = []
    for rank in (0, 1):
        sampler = EpochSampler(loader.dataset, 2, rank, True, 2, loader.sampler.chances)
        sampler.set_epoch(1)
        keys.append(list(sampler))
    alone = EpochSampler(loader.dataset, 1, 0, True, 2, loader.sampler.chances)
    alone.set_epoch(1)
    assert [key for pair in zip(*keys, strict=True) for key in pair] == list(alone)


def test_repeats_number_the_occurrences() -> None:
    sampler = EpochSampler(numbered(10), 1, 0, training=True, seed=0, chances=skewed((9, 1)))
    seen: Counter[int] = Counter()
    for _, index, repeat in sampler:
        assert repeat == seen[index]
        seen[index] += 1
    assert seen[9] == 5


def test_an_image_of_several_classes_follows_its_rarest() -> None:
    chances = class_balance([(0,), (0, 1), (0,), (), (0,)], 2)
    assert chances.tolist() == [1 / 4, 1.0, 1 / 4, 1.0, 1 / 4]


def test_drawing_is_unbiased() -> None:
    chances, rng = np.array([5.0, 1.0, 1.0, 0.5, 0.5]), np.random.default_rng(0)
    drawn: Counter[int] = Counter()
    for _ in range(3000):
        order = rng.permutation(5)
        drawn.update(draw_evenly(chances[order], rng, order).tolist())
    shares = np.array([drawn[item] for item in range(5)]) / 15000
    assert np.abs(shares - chances / chances.sum()).max() < 0.01
