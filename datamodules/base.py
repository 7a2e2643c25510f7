"""What every data source shares: splits, classes, augmentation and loaders."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import albumentations as A
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray

from datamodules.checking import (
    MAX_WORKERS,
    all_cores,
    channel_statistics,
    name_unreadable,
    unreadable_images,
)
from datamodules.dataset import UNLABELLED, ImageDataset, ImageLoader, ResumableDataLoader
from datamodules.division import VAL_FRACTION, Division
from datamodules.errors import DataError
from datamodules.keeping import kept_images
from datamodules.preprocessing import Preprocessing
from datamodules.record import measured_record, resolve_record
from datamodules.sampling import EpochSampler, class_balance, keys_of
from datamodules.split_images import SplitImages
from datamodules.storage import FileStorage
from datamodules.table import ImageTable, Listing
from datamodules.transforms import Augmentation, Orientation, turns
from datamodules.unlabelled import UnlabelledImages

Imbalance = Literal["none", "balanced_sampling", "weighted_loss", "logit_adjustment"]
Loader = TypeVar("Loader", bound=ImageLoader)

_BATCH_SIZE = 32


class ImageDataModule(LightningDataModule):
    """Labelled images for training, validation and test, and unlabelled ones for prediction.

    A batch is ``{"image": uint8 (N, 3, size, size), "target": int64 (N,), "index": int64 (N,)}``; ``index`` counts
    the images of the split. Images have other ``channels`` and ``dtype`` where the data has; where an image may have
    several classes, ``target`` is float32 ``(N, number of classes)``; where images have weights, there is ``weight``,
    float32 ``(N,)``, 1 on average over the training images.

    A subclass says where the images are, by :meth:`find_images`.

    Args:
        root: folder of the data.
        batch_size: images in a batch, on each device; ``auto``: 32.
        image_size: side of the network's square input in pixels, at least 32; ``auto``: what the weights were
            trained with.
        crop_fraction: share of the short side that evaluation keeps, in (0, 1]; ``auto``: as the weights ask for.
            Set 1.0 where the subject fills the picture.
        train_size: side of the images that are trained on, in pixels; ``auto``: as ``image_size``.
        reduced_epochs: so many first epochs train on images of about four fifths of that side (a multiple of 32 px),
            which is about two thirds of the work; ``auto``: 0.
        train_transforms: augmentation of training images: ``light``, ``standard``, ``strong``, ``trivial_augment``, or
            a list of albumentations transforms, without normalisation.
        smallest_crop: least share of an image's area that those named augmentations crop to, in (0, 1]; ``auto``: what
            each has of its own, 0.5, 0.25, 0.1 and 0.25 in the order above.
        orientation: how those named augmentations turn images: ``upright``: not at all; ``mirrored``: left to right;
            ``flipped``: upside down, too; ``any``: by quarter turns, too; ``auto``: ``mirrored``.
        channels: of the images. Other than 3, or of another dtype than uint8, every image must have them (TIFF or NPY,
            16-bit PNG); their mean and standard deviation are then measured on training images.
        dtype: of the images' values: ``uint8``, ``uint16`` or ``float32``.
        val_fraction: share of the images used for validation, where the data is not divided already; 0: none are;
            auto: 0.1, unless a plan finds too few images to spare any.
        test_fraction: share of the images kept for the final test, where the data is not divided already.
        split_seed: of the split, where the data is not divided already; apart from ``seed``, so that runs which
            differ in their seed are tested on the same images.
        fold: ``i of k``: cut the images in k parts by ``split_seed`` and test on part i.
        split_file: divide as this file says, such as ``split.csv`` of an earlier run: columns path and split.
        group_pattern: regular expression that finds in a path what must not be on both sides of a drawn split, such as
            ``(patient_[0-9]+)``; where the data names no groups itself.
        imbalance: what is done for rare classes; follows ``imbalance`` on the command line. Here
            ``balanced_sampling`` matters: every class is drawn equally often.
        unreadable: ``error``: training does not start where an image cannot be read; all such images are named.
            ``skip``: they are left out and counted.
        cache: folder for decoded images, which later epochs and runs read in place of the files; none: no cache.
        cache_gigabytes: what that folder may grow to, in 10^9 bytes; images beyond it are decoded each time.
        num_workers: processes that read images, on each device; ``auto``: one for each core of its share, at most 8.
        seed: of the order and the augmentation; follows ``seed_everything`` on the command line.
        preprocessing: what the network expects (see :class:`~datamodules.preprocessing.Preprocessing`); follows the
            backbone and its weights, or the checkpoint.
        classes: the label space in order; follows the training data, or the checkpoint.
        multi_label: whether an image may have several classes; follows the data, or the checkpoint.
        predict_path: unlabelled images for ``predict``: a folder, or a CSV or Parquet file with a column ``path``;
            none: the test split.

    Raises:
        DataError: the data is not as described; the message names file or class.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int | Literal["auto"] = "auto",
        image_size: int | Literal["auto"] = "auto",
        crop_fraction: float | Literal["auto"] = "auto",
        train_size: int | Literal["auto"] = "auto",
        reduced_epochs: int | Literal["auto"] = "auto",
        train_transforms: str | list[A.BasicTransform | A.BaseCompose] = "standard",
        smallest_crop: float | Literal["auto"] = "auto",
        orientation: Orientation | Literal["auto"] = "auto",
        channels: int = 3,
        dtype: Literal["uint8", "uint16", "float32"] = "uint8",
        val_fraction: float | Literal["auto"] = "auto",
        test_fraction: float = 0.2,
        split_seed: int = 0,
        fold: str | None = None,
        split_file: str | None = None,
        group_pattern: str | None = None,
        imbalance: Imbalance = "none",
        unreadable: Literal["error", "skip"] = "error",
        cache: str | None = None,
        cache_gigabytes: float = 20.0,
        num_workers: int | Literal["auto"] = "auto",
        seed: int = 0,
        preprocessing: dict[str, Any] | None = None,
        classes: list[str] | None = None,
        multi_label: bool | None = None,
        predict_path: str | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _BATCH_SIZE if batch_size == "auto" else batch_size
        if self.batch_size < 2:
            raise DataError(f"data.batch_size: expected at least 2 (batch normalisation compares), found {batch_size}.")
        numbers = {"num_workers": num_workers, "split_seed": split_seed, "seed": seed, "reduced_epochs": reduced_epochs}
        for name, value in numbers.items():
            if value != "auto" and value < 0:
                raise DataError(f"data.{name}: expected 0 or more, found {value}.")
        if channels < 1:
            raise DataError(f"data.channels: expected at least 1, found {channels}.")
        if not cache_gigabytes > 0:
            raise DataError(f"data.cache_gigabytes: expected more than 0, found {cache_gigabytes}.")
        self.root = root
        val_fraction = VAL_FRACTION if val_fraction == "auto" else val_fraction
        self.division = Division(val_fraction, test_fraction, split_seed, fold, split_file, group_pattern)
        self.imbalance = imbalance
        self.unreadable = unreadable
        self.cache = None if cache is None else Path(cache).expanduser()
        self.cache_bytes = int(cache_gigabytes * 1e9)
        self.num_workers = num_workers
        self.seed = seed
        self.predict_path = predict_path
        #: The label space in order; a model's output ``i`` is the score of ``classes[i]``.
        self.classes = list(classes) if classes is not None else self._classes_of_training_data()
        self._multi_label = multi_label
        #: Share of the training images that have each class, in order; None where classes came from elsewhere.
        self.class_shares = None if classes is not None else self._shares_of_training_data()
        record = resolve_record(preprocessing, image_size, crop_fraction)
        if (channels, dtype) != (record["channels"], record.get("dtype", "uint8")):
            record = measured_record(record, channels, dtype, self._channel_statistics)
        self.preprocessing = Preprocessing.from_dict(record)
        if train_size != "auto" and train_size < 32:
            raise DataError(f"data.train_size: expected at least 32 pixels, found {train_size}.")
        size = None if train_size == "auto" else train_size
        turned: Orientation = "mirrored" if orientation == "auto" else orientation
        #: What a picture may be turned into: by name, functions of square pictures ``(N, C, H, W)``.
        self.turns = turns(turned)
        smallest = None if smallest_crop == "auto" else smallest_crop
        reduced = 0 if reduced_epochs == "auto" else reduced_epochs
        self.augmentation = Augmentation(train_transforms, self.preprocessing, size, turned, smallest, reduced)
        #: Told what takes long: its name, how much is done, of how many.
        self.progress: Callable[[str, int, int], None] = lambda *_: None
        #: Images that are left out because they cannot be read, with the reason, by split and row.
        self.skipped: dict[str, dict[int, str]] = {}
        self._training: ResumableDataLoader | None = None
        self._resume_at: dict[str, int] | None = None

    @abstractmethod
    def find_images(self) -> Listing:
        """The images of the source. Opens none."""

    @property
    def dataset_name(self) -> str:
        """What the data set is called in tracking."""
        return Path(self.table.listing.storage.location).name

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return self.table.listing.separator is not None if self._multi_label is None else self._multi_label

    @cached_property
    def table(self) -> ImageTable:
        """Every image of the source with its split; its labels are all in ``classes``."""
        table = self.division.divide(self.find_images())
        known = getattr(self, "classes", None)
        if known is not None:
            table.require_classes(known)
        return table

    def _classes_of_training_data(self) -> list[str]:
        table = self.table
        classes = sorted(table.counts("train"))
        fewest = 1 if table.listing.separator is not None else 2
        if len(classes) < fewest:
            raise DataError(
                f"data.root: expected images of at least {fewest} classes in {table.listing.storage.location}, found "
                f"{len(classes)} ({', '.join(classes) or 'none'}); a classifier needs something to tell apart."
            )
        table.require_classes(classes)
        return classes

    def _shares_of_training_data(self) -> list[float]:
        counts, images = self.table.counts("train"), len(self.table.rows("train"))
        return [counts[name] / images for name in self.classes]

    def _channel_statistics(self, record: dict[str, Any]) -> tuple[list[float], list[float]]:
        dataset = self._dataset("train", Preprocessing.from_dict(record), None)
        return channel_statistics(dataset, self.division.seed)

    def images(self, split: str) -> SplitImages:
        """The images of a split (``train``, ``val``, ``test`` or ``predict``), by a batch's ``index``."""
        if self._is_unlabelled(split):
            names = self._unlabelled
            found = SplitImages(FileStorage(self.unlabelled.root, names), np.arange(len(names)), names)
        else:
            listing, rows = self.table.listing, self.table.rows("test" if split == "predict" else split)
            found = SplitImages(listing.storage, rows, listing.paths, listing.groups, listing.metadata)
        # Not there yet while the data module is made, which measures images of other kinds.
        skipped = list(getattr(self, "skipped", {}).get(split, ()))
        return replace(found, rows=found.rows[~np.isin(found.rows, skipped)]) if skipped else found

    def _is_unlabelled(self, split: str) -> bool:
        return split == "predict" and self.predict_path is not None

    @cached_property
    def _unlabelled(self) -> list[str]:
        return list(self.unlabelled)

    @property
    def unlabelled(self) -> UnlabelledImages:
        """The images that `predict` is given."""
        assert self.predict_path is not None
        return UnlabelledImages.of(self.predict_path)

    def dataset(self, split: str) -> ImageDataset:
        """The images of ``train``, ``val``, ``test`` or ``predict``; only those of ``train`` are augmented."""
        return self._dataset(split, self.preprocessing, self.augmentation if split == "train" else None)

    def plain(self, split: str) -> ImageDataset:
        """The images of a split as evaluation prepares them, also those of ``train``."""
        return self._dataset(split, self.preprocessing, None)

    def everything(self) -> ImageDataset:
        """All images of the table, row by row, as evaluation prepares them; unreadable ones are not left out."""
        rows = np.arange(len(self.table.paths))
        return ImageDataset(self.table.listing.storage, rows, self._targets(rows), self.preprocessing, None, self.seed)

    def plain_batches(self, dataset: ImageDataset, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """Some images of a dataset in this order, ``(B, C, size, size)``; augmented ones never look the same twice."""
        for batch in ImageLoader(
            dataset, batch_size=self.batch_size, sampler=keys_of(indices), num_workers=self.workers(1)
        ):
            yield batch["image"]

    def _dataset(self, split: str, preprocessing: Preprocessing, augmentation: Augmentation | None) -> ImageDataset:
        images = self.images(split)
        weights = None
        if self._is_unlabelled(split):
            targets: NDArray[Any] = np.full(len(images), UNLABELLED)
        else:
            targets = self._targets(images.rows)
            if split == "train" and self.table.listing.weights is not None:
                given = np.array([self.table.listing.weights[row] for row in images.rows], np.float32)
                weights = given / given.mean()
        return ImageDataset(images.storage, images.rows, targets, preprocessing, augmentation, self.seed, weights)

    def _targets(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        return self.table.targets(rows, self.classes, self.multi_label)

    @property
    def _splits_of_stage(self) -> tuple[str, ...]:
        assert self.trainer is not None
        assert self.trainer.state.fn is not None
        stage = self.trainer.state.fn.value
        return {"fit": ("train", "val", "test"), "validate": ("val",)}.get(stage, (stage,))

    def prepare_data(self) -> None:
        """Try every image that the coming stage reads, once, and fill the cache, where there is one.

        Raises:
            DataError: at least one image cannot be read, and ``unreadable`` is ``error``; all of them are named.
        """
        if self.trainer is None or self.trainer.state.fn is None:
            return
        tried = 0
        for split in self._splits_of_stage:
            if split in self.skipped:
                continue
            dataset = self.dataset(split)
            if dataset.storage.tried:
                continue
            reasons = unreadable_images(dataset, partial(self.progress, f"trying {split}"))
            tried += len(dataset)
            self.skipped[split] = reasons
        bad = self.left_out
        if bad and self.unreadable == "error":
            self.skipped.clear()
            raise DataError(name_unreadable(bad, tried))
        if self.skipped.get("train"):
            found = {name for row in self.images("train").rows for name in self.table.listing.classes_of(row)}
            if missing := [name for name in self.classes if name not in found]:
                raise DataError(
                    "data.unreadable: expected images of every class in train that can be read, found none of "
                    f"{', '.join(missing)}; repair them, or remove the class."
                )

    @property
    def left_out(self) -> list[str]:
        """Each image that is left out because it cannot be read, with the reason in parentheses."""
        return [
            f"{self.images(split).storage.describe(row)} ({why})"
            for split, reasons in self.skipped.items()
            for row, why in reasons.items()
        ]

    def setup(self, stage: str) -> None:
        # What was found by the process that looked is what all of them leave out.
        if self.trainer is not None:
            self.skipped = self.trainer.strategy.broadcast(self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """Kept in every checkpoint: which images were in which split, and how far the epoch had come."""
        position = self._training.position if self._training is not None else None
        return {"digest": self.table.digest, "position": position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other data, or to test on images that may have been trained on.

        Raises:
            DataError: the images or their split are not those of the checkpoint.
        """
        assert self.trainer is not None
        stage = self.trainer.state.fn
        if stage == "predict" and self.predict_path is not None:
            return
        chosen_here = self.table.split_is_ours or self.division.split_file is not None
        if (stage == "fit" or chosen_here) and self.table.digest != state_dict["digest"]:
            raise DataError(
                f"data: expected the images and the split that the checkpoint was trained with (digest "
                f"{state_dict['digest'][:12]}), found others in {self.table.listing.storage.location} (digest "
                f"{self.table.digest[:12]}). With files, data.split_seed or fractions changed, images that were "
                "trained on would be tested on: restore them, test images of their own in test/<class> folders, or "
                "start a new run."
            )
        if stage == "fit":
            # Not left to Lightning, which restores stateful loaders only if nothing has asked for the number of steps
            # before; the learning-rate schedule has.
            self._resume_at = state_dict["position"]

    def train_dataloader(self) -> ResumableDataLoader:
        self._training = self._loader("train", ResumableDataLoader)
        if self._resume_at is not None:
            self._training.go_on_from(self._resume_at)
            self._resume_at = None
        return self._training

    def val_dataloader(self) -> ImageLoader | list[ImageLoader]:
        return self._loader("val", ImageLoader) if len(self.images("val")) else []

    def test_dataloader(self) -> ImageLoader:
        return self._loader("test", ImageLoader)

    def predict_dataloader(self) -> ImageLoader:
        return self._loader("predict", ImageLoader)

    def _loader(self, split: str, kind: type[Loader]) -> Loader:
        dataset = self.dataset(split)
        training = split == "train"
        sampler = self._sampler(split, dataset)
        if self.cache is not None:
            dataset.kept = kept_images(
                dataset, self.cache, self.cache_bytes, partial(self.progress, f"decoding {split}")
            )
        workers = self.workers(self.trainer.num_devices if self.trainer is not None else 1)
        return kind(
            dataset,
            # In evaluation, too: twice as many, larger and in float32, take twice the memory of a training step.
            batch_size=self.batch_size,
            sampler=sampler,
            # A last batch of one image would leave batch normalisation without a variance.
            drop_last=training and len(sampler) >= self.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0 and split in ("train", "val"),
            pin_memory=torch.cuda.is_available(),
        )

    def _sampler(self, split: str, dataset: ImageDataset) -> EpochSampler:
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        if len(dataset) < replicas:
            raise DataError(
                f"data: expected at least one image of {split} for each of {replicas} processes, found {len(dataset)}; "
                "use fewer devices."
            )
        training = split == "train"
        blocks = dataset.storage.blocks
        chances = None
        if training and self.imbalance == "balanced_sampling":
            if blocks is not None:
                raise DataError(
                    "imbalance: expected weighted_loss or logit_adjustment for data that is streamed, found "
                    "balanced_sampling, which would fetch every block many times."
                )
            number = {name: index for index, name in enumerate(self.classes)}
            labels = [tuple(number[name] for name in self.table.listing.classes_of(row)) for row in dataset.rows]
            chances = class_balance(labels, len(self.classes))
        return EpochSampler(
            dataset,
            replicas,
            rank,
            training=training,
            seed=self.seed,
            chances=chances,
            blocks=None if blocks is None else blocks[dataset.rows],
            window=dataset.storage.window,
        )

    def workers(self, processes: int) -> int:
        """Reading processes of each of so many training ones on this machine."""
        if self.num_workers != "auto":
            return self.num_workers
        return max(1, min(MAX_WORKERS, all_cores() // processes))
