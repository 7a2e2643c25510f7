"""Reading single images: a map-style dataset, and a loader that resumes where a run stopped."""

import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.decode import EncodedImage
from datamodules.errors import DataError
from datamodules.preprocessing import Picture, Preprocessing
from datamodules.pyramid import PyramidImage
from datamodules.sampling import EpochSampler, SampleKey
from datamodules.storage import Storage
from datamodules.transforms import Augmentation

#: Target of an image whose class is not known.
UNLABELLED = -1

Item = dict[str, Any]


class Kept(Protocol):
    """Images that need no decoding any more: by position, or None where one is not kept."""

    def get(self, position: int) -> NDArray[Any] | None: ...


class ImageDataset(Dataset[Item]):
    """Images of a storage; one item is ``{"image", "target", "index"}``, and ``weight`` where images have one.

    ``image`` is ``(C, size, size)`` of the images' dtype, ``target`` an int, or float32 ``(number of classes,)`` where
    an image may have several, ``index`` an int. What an augmented item looks like depends on ``(seed, epoch, index)``
    and on how often the index came before in that epoch, alone; whichever worker or rank reads it.

    Args:
        storage: where the images are.
        rows: of the storage, one for each item.
        targets: int64 ``(N,)``, :data:`UNLABELLED` where it is not known; or float32 ``(N, number of classes)``.
        preprocessing: geometry and kind of the network's input.
        augmentation: of training images; None prepares images as evaluation does.
        seed: of the augmentation.
        weights: of each image in the loss, float32 ``(N,)``; None: all alike.
        kept: decoded images; what they hold is what :meth:`to_keep` makes.
    """

    def __init__(
        self,
        storage: Storage,
        rows: Sequence[int] | NDArray[np.int64],
        targets: NDArray[Any],
        preprocessing: Preprocessing,
        augmentation: Augmentation | None,
        seed: int,
        weights: NDArray[np.float32] | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.storage = storage
        self.rows = np.asarray(rows, dtype=np.int64)
        self.targets = targets
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self.weights = weights
        self.kept = kept

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: SampleKey) -> Item:
        """The item for ``(epoch, index, repeat)``, as :class:`~datamodules.sampling.EpochSampler` gives it.

        Raises:
            DataError: the image cannot be decoded; the message names it.
        """
        epoch, index, repeat = key
        image = self._prepared(index) if self.augmentation is None else self._augmented(epoch, index, repeat)
        if not image.flags.writeable or not image.flags.c_contiguous:
            image = np.array(image)
        # Channels last in memory, as the network wants it; nothing is copied here.
        item: Item = {"image": torch.from_numpy(image).permute(2, 0, 1), "index": index}
        item["target"] = int(self.targets[index]) if self.targets.ndim == 1 else torch.from_numpy(self.targets[index])
        if self.weights is not None:
            item["weight"] = torch.tensor(self.weights[index])
        return item

    def open(self, index: int) -> EncodedImage:
        """The encoded image of an index, its head read.

        Raises:
            OSError: it is unreadable, or of another kind than the network takes.
        """
        return self.open_row(int(self.rows[index]))

    def open_row(self, row: int) -> EncodedImage:
        """The same by row of the storage."""
        return EncodedImage(self.storage.source(row), self.preprocessing.channels, self.preprocessing.dtype)

    def _prepared(self, index: int) -> NDArray[Any]:
        kept = self.kept.get(index) if self.kept is not None else None
        if kept is not None:
            return kept
        try:
            return self.preprocessing.prepare(self.open(index))
        except OSError as error:
            raise self._unreadable(index, error) from error

    def _augmented(self, epoch: int, index: int, repeat: int) -> NDArray[Any]:
        assert self.augmentation is not None
        kept = self.kept.get(index) if self.kept is not None else None
        # The first occurrence in an epoch has its own short key; others differ from it.
        seed = np.random.SeedSequence((self.seed, epoch, index, repeat) if repeat else (self.seed, epoch, index))
        try:
            picture: Picture = PyramidImage(kept) if kept is not None else self.open(index)
            return self.augmentation.at(epoch)(picture, seed)
        except OSError as error:
            raise self._unreadable(index, error) from error
        except Exception as error:  # transforms are the person's choice, and each has its own types
            raise DataError(
                f"data.train_transforms: expected transforms that fit the images, found {type(error).__name__} on "
                f"{self.storage.describe(int(self.rows[index]))} ({_in_one_line(error)}); change the transforms."
            ) from error

    def _unreadable(self, index: int, error: OSError) -> DataError:
        return DataError(
            f"{self.storage.describe(int(self.rows[index]))}: expected an image that can be read, found "
            f"{_in_one_line(error)}; repair or remove the file."
        )


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class ImageLoader(DataLoader[Item]):
    """A data loader of an :class:`ImageDataset`: reading processes that keep to one core each, images channels last."""

    def __init__(self, dataset: ImageDataset, **settings: Any) -> None:
        super().__init__(dataset, collate_fn=_collate, worker_init_fn=_prepare_reader, **settings)


class ResumableDataLoader(ImageLoader):
    """A data loader that, restored in the middle of an epoch, goes on with the batches not yet given out.

    The datamodule keeps its position in every checkpoint. Its sampler must be an :class:`EpochSampler`.
    """

    _given = 0
    _resume_at = (-1, 0)

    def __iter__(self) -> Iterator[Item]:  # type: ignore[override]
        # A generator: nothing happens before the first batch is asked for, when the epoch has been set.
        assert isinstance(self.sampler, EpochSampler)
        epoch, given = self._resume_at
        self._resume_at = (-1, 0)
        self._given = given if epoch == self.sampler.epoch and given < len(self) else 0
        self.sampler.skip = self._given * (self.batch_size or 1)
        for batch in super().__iter__():
            self._given += 1
            yield batch

    @property
    def position(self) -> dict[str, int]:
        """The epoch, and how many of its batches were given out."""
        assert isinstance(self.sampler, EpochSampler)
        return {"epoch": self.sampler.epoch, "batches": self._given}

    def go_on_from(self, position: dict[str, int]) -> None:
        """Leave out, in that epoch, the batches that were given out before."""
        self._resume_at = (position["epoch"], position["batches"])


def _collate(items: list[Item]) -> Item:
    """A batch whose images are ``(N, C, H, W)`` with the channels last in memory: no transposition anywhere."""
    batch: Item = default_collate([{**item, "image": item["image"].permute(1, 2, 0)} for item in items])
    return {**batch, "image": batch["image"].permute(0, 3, 1, 2)}


def _prepare_reader(_: int) -> None:
    """Prepare a reading process.

    It keeps to one thread, because there are as many processes as cores, and leaves Ctrl-C to the main process, which
    would otherwise lose its readers before it can save a checkpoint.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
