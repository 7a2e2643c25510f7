"""Which decoded images are kept on disk: for training what crops are cut from, else what the network takes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from datamodules.cache import ImageCache
from datamodules.checking import usable_cores
from datamodules.dataset import ImageDataset
from datamodules.pyramid import build_pyramid


def kept_images(
    dataset: ImageDataset, folder: Path, limit_bytes: int, progress: Callable[[int, int], None]
) -> ImageCache:
    """Find or build the cache of a dataset's images.

    Images that are augmented are kept as a pyramid, no larger than the smallest crop of the augmentation needs. Others
    are kept as evaluation prepares them, to the bit.

    Args:
        dataset: whose images are kept.
        folder: of the cache.
        limit_bytes: what the folder may grow to.
        progress: is told how many images are done, of how many, while the cache is built.

    Raises:
        DataError: the folder cannot be written.
        OSError: an image cannot be read.
    """
    record = dataset.preprocessing
    kind: dict[str, Any] = {"channels": record.channels, "dtype": record.dtype}
    prepare: Callable[[int], NDArray[Any]]
    if dataset.augmentation is None:
        geometry = {"size": record.size, "crop": record.crop, "interpolation": record.interpolation}
        recipe = {"kept": "prepared", **geometry, **kind}
        prepare = partial(_prepared, dataset)
    else:
        recipe = {"kept": "pyramid and size", "short_side": dataset.augmentation.short_side, **kind}
        prepare = partial(_pyramid, dataset)
    return ImageCache.open(
        folder, dataset.storage, dataset.rows.tolist(), recipe, prepare, limit_bytes, progress, threads=usable_cores()
    )


def _prepared(dataset: ImageDataset, row: int) -> NDArray[Any]:
    return dataset.preprocessing.prepare(dataset.open_row(row))


def _pyramid(dataset: ImageDataset, row: int) -> NDArray[Any]:
    assert dataset.augmentation is not None
    picture, short_side = dataset.open_row(row), dataset.augmentation.short_side
    share = 1.0 if short_side is None else min(1.0, short_side / min(picture.height, picture.width))
    return build_pyramid(picture.pixels(share), short_side, (picture.height, picture.width))
