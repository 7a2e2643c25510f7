"""Trying every image before training, and measuring what their values are like."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from datamodules.dataset import ImageDataset

MAX_WORKERS = 8
#: Images whose values are looked at to find mean and standard deviation.
_MEASURED = 1_000
# Images that wait to be tried: all at once would fill the memory, and hold up who interrupts it.
_AT_ONCE = 1_000

#: Told what is being done, how much of it is done, and of how many.
Progress = Callable[[str, int, int], None]

_SCALES = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


def all_cores() -> int:
    """Cores that this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return available or 1


def usable_cores() -> int:
    """Cores that this process may use, at most 8."""
    return min(MAX_WORKERS, all_cores())


def unreadable_images(dataset: ImageDataset, progress: Callable[[int, int], None]) -> dict[int, str]:
    """Decode every image, at the smallest scale that meets each byte of it.

    Returns:
        Of those that cannot be decoded, the reason, by row of the storage.

    Args:
        dataset: of which every image is tried.
        progress: is told how many are done, of how many.
    """

    def reason(index: int) -> str | None:
        try:
            dataset.open(index).pixels(share=1 / 8)
        except OSError as error:
            return " ".join(str(error).split())
        return None

    found: dict[int, str] = {}
    with ThreadPoolExecutor(usable_cores()) as pool:  # decoders do not hold the interpreter's lock
        for start in range(0, len(dataset), _AT_ONCE):
            tried = range(start, min(start + _AT_ONCE, len(dataset)))
            for index, why in zip(tried, pool.map(reason, tried), strict=True):
                if why is not None:
                    found[int(dataset.rows[index])] = why
                progress(index + 1, len(dataset))
    return found


def channel_statistics(dataset: ImageDataset, seed: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, over up to 1,000 images drawn by ``seed``; unreadable ones left out.

    Integers are scaled to [0, 1] first, as the network does; floats are taken as they are.

    Args:
        dataset: of the training images.
        seed: of the draw.

    Raises:
        OSError: not one of them can be read; the reason of the first.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:_MEASURED])
    sums: list[np.ndarray] = []
    first: OSError | None = None
    for index in chosen:
        try:
            pixels = dataset.preprocessing.prepare(dataset.open(int(index)))
        except OSError as error:
            first = first or error
            continue
        values = pixels.reshape(-1, pixels.shape[2]).astype(np.float64) / _SCALES[str(pixels.dtype)]
        sums.append(np.stack([values.mean(axis=0), (values**2).mean(axis=0)]))
    if not sums:
        raise first or OSError("there is none")
    mean, squares = np.mean(sums, axis=0)
    deviation = np.sqrt(np.maximum(squares - mean**2, 0))
    # A channel of one value everywhere says nothing, and must not be divided by nothing.
    return mean.tolist(), np.where(deviation > 0, deviation, 1.0).tolist()


def name_unreadable(described: Sequence[str], total: int) -> str:
    """A line that names unreadable images with their reasons.

    Args:
        described: each image with its reason.
        total: how many images were tried.
    """
    return (
        f"data: expected {total:,} images that can be read, found {len(described):,} that cannot: "
        f"{first_of(described)}; repair or remove them, or leave them out by data.unreadable skip."
    )


def first_of(described: Sequence[str]) -> str:
    """Ten of them, and the number of the others.

    Example:
        >>> first_of([str(number) for number in range(12)])
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    return ", ".join(described[:10]) + (f" and {len(described) - 10:,} more" if len(described) > 10 else "")
