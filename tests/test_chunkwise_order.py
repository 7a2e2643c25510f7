"""The order in which images in chunks are visited."""

import random
from collections import Counter

import numpy as np
import pytest

from datamodules.sampling import chunkwise_order

BLOCKS = np.repeat(np.arange(40), np.random.default_rng(0).integers(5, 60, 40))


def begun_and_not_finished(visited: np.ndarray) -> np.ndarray:
    """At every step, how many chunks have been begun and are needed again."""
    first = {block: np.flatnonzero(visited == block)[0] for block in set(visited.tolist())}
    last = {block: np.flatnonzero(visited == block)[-1] for block in first}
    steps = np.arange(len(visited))
    return sum((steps >= first[block]) & (steps <= last[block]) for block in first)


@pytest.mark.parametrize("window", [1, 2, 3, 8, 39, 40, 1000])
def test_every_image_is_visited_once_and_few_chunks_at_a_time(window):
    order = chunkwise_order(BLOCKS, seed=1, epoch=2, window=window)
    assert sorted(order.tolist()) == list(range(len(BLOCKS)))
    assert begun_and_not_finished(BLOCKS[order]).max() <= window


def test_chunks_of_a_window_are_mixed():
    visited = BLOCKS[chunkwise_order(BLOCKS, seed=0, epoch=0, window=8)]
    middle = visited[len(visited) // 4 : -len(visited) // 4]
    different = [len(set(middle[start : start + 64].tolist())) for start in range(0, len(middle) - 64, 64)]
    assert min(different) >= 5
    assert (middle[1:] == middle[:-1]).mean() < 0.35


def test_the_order_depends_on_seed_and_epoch_alone():
    state, legacy = random.getstate(), np.random.get_state()[1].copy()
    orders = {(s, e): chunkwise_order(BLOCKS, s, e, window=4).tolist() for s in (0, 1) for e in (0, 1, 2)}
    again = {key: chunkwise_order(BLOCKS, *key, window=4).tolist() for key in orders}
    assert orders == again
    assert len({tuple(order) for order in orders.values()}) == 6
    assert random.getstate() == state
    assert (np.random.get_state()[1] == legacy).all()


def test_chunks_come_in_another_order_every_epoch():
    firsts = {int(BLOCKS[chunkwise_order(BLOCKS, 0, epoch, window=4)[0]]) for epoch in range(20)}
    assert len(firsts) > 10


def test_numbers_of_chunks_are_labels():
    """A split has only some of the chunks, and the images of one need not lie together."""
    mixed = np.random.default_rng(0).permutation(BLOCKS) * 7 + 3
    order = chunkwise_order(mixed, seed=0, epoch=0, window=2)
    assert begun_and_not_finished(mixed[order]).max() <= 2


def test_few_chunks_are_shuffled_as_one():
    """All pairs of images are equally likely to come first, those of one chunk and others."""
    blocks = np.repeat([0, 1, 2], 2)
    firsts = [tuple(sorted(chunkwise_order(blocks, 0, epoch, window=3)[:2].tolist())) for epoch in range(3000)]
    counts = Counter(firsts)
    assert len(counts) == 15
    assert all(150 < count < 250 for count in counts.values())


def test_chunks_are_visited_evenly_in_their_time():
    """The images of a chunk are not all at the beginning of its time."""
    blocks = np.repeat(np.arange(50), 200)
    visited = blocks[chunkwise_order(blocks, seed=0, epoch=0, window=5)]
    steady = visited[2000:-2000]
    for block in np.unique(steady[2000:-2000]):
        steps = np.flatnonzero(visited == block)
        halves = (steps < (steps[0] + steps[-1]) / 2).mean()
        assert 0.35 < halves < 0.65


def test_no_images_and_one():
    assert chunkwise_order(np.array([], dtype=np.int64), 0, 0, window=2).tolist() == []
    assert chunkwise_order(np.array([9]), 0, 0, window=1).tolist() == [0]
