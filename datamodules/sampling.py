"""In which order images are read: by seed and epoch alone, shared out among ranks."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

#: Epoch, index of the image, and how often the index came before in that epoch.
SampleKey = tuple[int, int, int]


class EpochSampler(DistributedSampler[SampleKey]):
    """Keys ``(epoch, index, repeat)`` of samples, this rank's share of them.

    Training shuffles by ``(seed, epoch)`` and repeats a few images so that all ranks take equally many steps;
    evaluation keeps the order and repeats none, so that every image counts once. (Being a ``DistributedSampler``
    it is left alone by Lightning, which would otherwise wrap it in one.)

    Args:
        dataset: what is sampled.
        num_replicas: ranks in all.
        rank: this one.
        training: shuffle, and even out the ranks.
        seed: of the shuffle.
        chances: how likely each image is to be drawn in training, float64 ``(N,)``, of any sum; None: each once.
        blocks: number of the block that each image lies in, int64 ``(N,)``: training goes block by block (see
            :func:`chunkwise_order`); None: in any order.
        window: how many blocks are mixed.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, object]],
        num_replicas: int,
        rank: int,
        training: bool,
        seed: int,
        chances: NDArray[np.float64] | None = None,
        blocks: NDArray[np.int64] | None = None,
        window: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=training, seed=seed)
        self.length = len(dataset)  # type: ignore[arg-type]
        self.chances = chances
        self.blocks = blocks
        self.window = window
        #: How many of the next pass's first samples to leave out; back at zero after that pass has begun.
        self.skip = 0

    def __iter__(self) -> Iterator[SampleKey]:
        order = np.arange(self.length)
        repeats = np.zeros(self.length, dtype=np.int64)
        if self.shuffle:
            rng = np.random.default_rng((self.seed, self.epoch))
            order = rng.permutation(self.length)
            if self.blocks is not None:
                order = chunkwise_order(self.blocks, self.seed, self.epoch, self.window)
            if self.chances is not None:
                order = draw_evenly(self.chances[order], rng, order)
                repeats = _occurrences_before(order)
            total = len(self) * self.num_replicas
            order, repeats = np.resize(order, total), np.resize(repeats, total)
        share = slice(self.rank, None, self.num_replicas)
        order, repeats = order[share][self.skip :], repeats[share][self.skip :]
        self.skip = 0
        return iter([(self.epoch, int(index), int(repeat)) for index, repeat in zip(order, repeats, strict=True)])

    def __len__(self) -> int:
        if self.shuffle:
            return -(-self.length // self.num_replicas)
        return len(range(self.rank, self.length, self.num_replicas))


def chunkwise_order(blocks: NDArray[np.int64], seed: int, epoch: int, window: int) -> NDArray[np.int64]:
    """A shuffle that visits chunk after chunk, a few at a time, so that few need to be at hand.

    Chunks come in random order, and the images of each are spread evenly over the time in which the next ``window - 1``
    chunks join in. At any time at most ``window`` chunks have been begun and not been finished, and none is visited
    twice. Where there are no more chunks than that, every order is equally likely.

    Args:
        blocks: chunk number of each sample, shape ``(samples,)``; the numbers are labels, their order does not count.
        seed: of the shuffle.
        epoch: another one, another order.
        window: how many chunks are mixed, at least 1.

    Returns:
        A permutation of the positions in ``blocks``.

    Example:
        >>> blocks = np.repeat(np.arange(4), 3)
        >>> order = chunkwise_order(blocks, seed=0, epoch=0, window=1)
        >>> blocks[order].tolist()
        [1, 1, 1, 2, 2, 2, 0, 0, 0, 3, 3, 3]
    """
    rng = np.random.default_rng((seed, epoch))
    chunks, codes = np.unique(blocks, return_inverse=True)
    if len(chunks) <= window:
        return rng.permutation(len(blocks))
    begins = rng.permutation(len(chunks))[codes]
    return np.argsort(begins + window * rng.random(len(blocks)), kind="stable")


def draw_evenly(chances: NDArray[np.float64], rng: np.random.Generator, items: NDArray[np.int64]) -> NDArray[np.int64]:
    """Draw as many items as there are, each about as often as its chance says, in random order.

    Systematic sampling: an item whose share is 2.3 draws comes two or three times, never not at all; drawing each time
    anew would leave out a third of what is due once.

    Args:
        chances: of each item, above 0, of any sum.
        rng: of the draw.
        items: in random order, so that neighbours in it have nothing in common.

    Example:
        >>> drawn = draw_evenly(np.array([3.0, 1.0, 1.0, 1.0]), np.random.default_rng(0), np.arange(4))
        >>> sorted(drawn.tolist())
        [0, 0, 1, 3]
    """
    count = len(items)
    # Alike chances beside one another: then a class, too, is drawn as often as it is due, give or take one.
    by_chance = np.argsort(chances, kind="stable")
    chances, items = chances[by_chance], items[by_chance]
    bounds = np.cumsum(chances) / np.sum(chances)
    places = (rng.random() + np.arange(count)) / count
    drawn = items[np.minimum(np.searchsorted(bounds, places, side="right"), count - 1)]
    return rng.permutation(drawn)


def class_balance(labels: list[tuple[int, ...]], classes: int) -> NDArray[np.float64]:
    """Chances under which every class is drawn equally often; an image of several classes follows its rarest.

    Args:
        labels: class indices of each image; an image without any counts as a class of its own.
        classes: how many there are.
    """
    counts = np.zeros(classes + 1)
    for found in labels:
        counts[list(found) or [classes]] += 1
    return np.array([max(1 / counts[index] for index in found or (classes,)) for found in labels])


def _occurrences_before(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each place, how often its value stands at earlier ones."""
    by_value = np.argsort(order, kind="stable")
    ordered = order[by_value]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ranks = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    before = np.empty_like(ranks)
    before[by_value] = ranks
    return before


def keys_of(indices: Iterable[int]) -> list[SampleKey]:
    """Keys of images in this order, in the first epoch.

    Example:
        >>> keys_of([4, 7, 4])
        [(0, 4, 0), (0, 7, 0), (0, 4, 1)]
    """
    came = Counter[int]()
    keys = []
    for index in map(int, indices):
        keys.append((0, index, came[index]))
        came[index] += 1
    return keys
