"""Reading single images: a map-style dataset, its sampler, and a loader that resumes where a run stopped."""

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.decode import decode
from datamodules.errors import DataError
from datamodules.preprocessing import Preprocessing
from datamodules.transforms import augment

#: Target of an image whose class is not known.
UNLABELLED = -1

Item = dict[str, Any]


class ImageDataset(Dataset[Item]):
    """Images read from files; one item is ``{"image", "target", "index"}``.

    ``image`` is uint8 ``(3, size, size)``, ``target`` and ``index`` are ints. What an augmented item looks like
    depends on ``(seed, epoch, index)`` alone, whichever worker or rank reads it.

    Args:
        root: folder that the paths are relative to.
        paths: of the images.
        targets: class index of each image, or :data:`UNLABELLED`.
        preprocessing: geometry of the network's input.
        augmentation: of training images; None prepares images as evaluation does.
        seed: of the augmentation.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        targets: Sequence[int],
        preprocessing: Preprocessing,
        augmentation: A.Compose | None,
        seed: int,
    ) -> None:
        self.root = root
        self.paths = list(paths)
        self.targets = np.asarray(targets, dtype=np.int64)
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        """The item for ``(epoch, index)``, as :class:`EpochSampler` gives it.

        Raises:
            DataError: the file cannot be decoded; the message names it.
        """
        epoch, index = key
        path = self.root / self.paths[index]
        try:
            image = decode(path)
        except OSError as error:
            raise DataError(
                f"{path}: expected an image that can be read, found {error}; repair or remove the file."
            ) from error
        if self.augmentation is not None:
            seed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]
            try:
                image = augment(self.augmentation, image, int(seed))
            except Exception as error:  # transforms are the person's choice, and each has its own types
                raise DataError(
                    f"data.train_transforms: expected transforms that fit the images, found {type(error).__name__} on "
                    f"{path} ({error}); change the transforms."
                ) from error
        # Evaluation always, as the served model does; a training image only if the transforms left another size.
        if self.augmentation is None or image.shape[:2] != (self.preprocessing.size,) * 2:
            image = self.preprocessing.fit_to_size(image)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"image": pixels, "target": int(self.targets[index]), "index": index}


class EpochSampler(DistributedSampler[ImageDataset]):
    """Pairs ``(epoch, index)``, this rank's share of them.

    Training shuffles by ``(seed, epoch)`` and repeats a few images so that all ranks take equally many steps;
    evaluation keeps the order and repeats none, so that every image counts once. (Being a ``DistributedSampler``
    it is left alone by Lightning, which would otherwise wrap it in one.)

    Args:
        dataset: what is sampled.
        num_replicas: ranks in all.
        rank: this one.
        training: shuffle, and even out the ranks.
        seed: of the shuffle.
    """

    def __init__(self, dataset: ImageDataset, num_replicas: int, rank: int, training: bool, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=training, seed=seed)
        self.length = len(dataset)
        #: How many of the next pass's first samples to leave out; back at zero after that pass has begun.
        self.skip = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
            order = np.resize(order, len(self) * self.num_replicas)
        else:
            order = np.arange(self.length)
        share = order[self.rank :: self.num_replicas][self.skip :]
        self.skip = 0
        return iter([(self.epoch, int(index)) for index in share])

    def __len__(self) -> int:
        if self.shuffle:
            return -(-self.length // self.num_replicas)
        return len(range(self.rank, self.length, self.num_replicas))


class ResumableDataLoader(DataLoader[Item]):
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


def worker_init(_: int) -> None:
    """Prepare a reading process.

    It keeps to one thread, because there are as many processes as cores, and leaves Ctrl-C to the main process, which
    would otherwise lose its readers before it can save a checkpoint.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
