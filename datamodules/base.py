"""What every data source shares: splits, classes, augmentation and loaders."""

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import albumentations as A
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader

from datamodules.dataset import UNLABELLED, EpochSampler, ImageDataset, Item, ResumableDataLoader, worker_init
from datamodules.decode import decode
from datamodules.errors import DataError
from datamodules.preprocessing import Preprocessing
from datamodules.table import ImageTable, list_images
from datamodules.transforms import build_augmentation

MAX_WORKERS = 8
#: Images that are decoded before training starts, at a millisecond or so each; of more, only the heads are read.
MOST_DECODED = 20_000

Loader = TypeVar("Loader", bound=DataLoader[Item])


class ImageDataModule(LightningDataModule):
    """Labelled images for training, validation and test, and unlabelled ones for prediction.

    A batch is ``{"image": uint8 (N, 3, size, size), "target": int64 (N,), "index": int64 (N,)}``; ``index`` counts
    the images of the split.

    A subclass says where the images are, by :meth:`find_images`.

    Args:
        root: folder of the data.
        batch_size: images in a batch, on each device.
        image_size: side of the network's square input in pixels, at least 32; ``auto``: what the weights were
            trained with.
        crop_fraction: share of the short side that evaluation keeps, in (0, 1]; ``auto``: as the weights ask for.
            Set 1.0 where the subject fills the picture.
        train_transforms: augmentation of training images: ``light``, ``standard``, ``strong``, or a list of
            albumentations transforms of uint8 pixels, without normalisation.
        val_fraction: share of the images used for validation, where the data is not divided already.
        test_fraction: share of the images kept for the final test, where the data is not divided already.
        num_workers: processes that read images, on each device; ``auto``: one for each core, at most 8.
        split_seed: of the split, where the data is not divided already; apart from ``seed``, so that runs which
            differ in their seed are tested on the same images.
        seed: of the order and the augmentation; follows ``seed_everything`` on the command line.
        preprocessing: what the network expects (see :class:`~datamodules.preprocessing.Preprocessing`); follows the
            backbone and its weights, or the checkpoint.
        classes: the label space in order; follows the training data, or the checkpoint.
        predict_path: folder of unlabelled images for ``predict``; none: the test split.

    Raises:
        DataError: the data is not as described; the message names file or class.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 32,
        image_size: int | Literal["auto"] = "auto",
        crop_fraction: float | Literal["auto"] = "auto",
        train_transforms: str | list[A.BasicTransform | A.BaseCompose] = "standard",
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        num_workers: int | Literal["auto"] = "auto",
        split_seed: int = 0,
        seed: int = 0,
        preprocessing: dict[str, Any] | None = None,
        classes: list[str] | None = None,
        predict_path: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise DataError(f"data.batch_size: expected at least 2 (batch normalisation compares), found {batch_size}.")
        for name, value in (("num_workers", num_workers), ("split_seed", split_seed), ("seed", seed)):
            if value != "auto" and value < 0:
                raise DataError(f"data.{name}: expected 0 or more, found {value}.")
        self.root = root
        self.batch_size = batch_size
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.num_workers = num_workers
        self.split_seed = split_seed
        self.seed = seed
        self.predict_path = predict_path
        self.preprocessing = _resolve_preprocessing(preprocessing, image_size, crop_fraction)
        self.augmentation = build_augmentation(train_transforms, self.preprocessing.size)
        #: The label space in order; a model's output ``i`` is the score of ``classes[i]``.
        self.classes = list(classes) if classes is not None else self._classes_of_training_data()
        self._checked: set[str] = set()
        self._training: ResumableDataLoader | None = None
        self._resume_at: dict[str, int] | None = None

    @property
    def dataset_name(self) -> str:
        """What the data set is called in tracking."""
        return self.table.root.name

    @abstractmethod
    def find_images(self) -> ImageTable:
        """The images of the source, divided into splits. Opens no image."""

    @cached_property
    def table(self) -> ImageTable:
        """Every image of the source; its labels are all in ``classes``."""
        table = self.find_images()
        known = getattr(self, "classes", None)
        if known is not None:
            for path, label in zip(table.paths, table.labels, strict=True):
                if label not in known:
                    raise DataError(
                        f"{table.root / path}: expected a class of the training data ({', '.join(known)}), found "
                        f"'{label}'; move the file to a known class or train again with this one."
                    )
        return table

    def _classes_of_training_data(self) -> list[str]:
        table = self.table
        classes = sorted(table.counts("train"))
        if len(classes) < 2:
            raise DataError(
                f"data.root: expected images of at least 2 classes in {table.root}, found "
                f"{len(classes)} ({', '.join(classes) or 'none'}); a classifier needs something to tell apart."
            )
        for split in ("val", "test"):
            for row in table.rows(split):
                if table.labels[row] not in classes:
                    raise DataError(
                        f"{table.root / table.paths[row]}: expected a class of the training images "
                        f"({', '.join(classes)}), found '{table.labels[row]}' in {split}; add training images of it "
                        "or remove it."
                    )
        return classes

    def paths(self, split: str) -> list[str]:
        """Paths of a split (``train``, ``val``, ``test`` or ``predict``), by a batch's ``index``."""
        if split == "predict" and self.predict_path is not None:
            return self._unlabelled
        rows = self.table.rows("test" if split == "predict" else split)
        return [self.table.paths[row] for row in rows]

    @cached_property
    def _unlabelled(self) -> list[str]:
        assert self.predict_path is not None
        folder = Path(self.predict_path).expanduser()
        if not folder.is_dir():
            raise DataError(f"data.predict_path: expected a folder of images, found nothing at '{folder}'.")
        paths = list_images(folder, folder)
        if not paths:
            raise DataError(f"data.predict_path: expected images in '{folder}', found none.")
        return paths

    def dataset(self, split: str) -> ImageDataset:
        """The images of ``train``, ``val``, ``test`` or ``predict``; only those of ``train`` are augmented."""
        if split == "predict" and self.predict_path is not None:
            root = Path(self.predict_path).expanduser()
            targets = [UNLABELLED] * len(self._unlabelled)
        else:
            root = self.table.root
            number = {label: index for index, label in enumerate(self.classes)}
            rows = self.table.rows("test" if split == "predict" else split)
            targets = [number[self.table.labels[row]] for row in rows]
        augmentation = self.augmentation if split == "train" else None
        return ImageDataset(root, self.paths(split), targets, self.preprocessing, augmentation, self.seed)

    def prepare_data(self) -> None:
        """Try every image that the coming stage reads, once; all unreadable ones are named together.

        Up to 20,000 images are decoded; of more, only the heads are read.

        Raises:
            DataError: at least one file cannot be read.
        """
        if self.trainer is None or self.trainer.state.fn is None:
            return
        stage = self.trainer.state.fn.value
        splits = {"fit": ("train", "val", "test"), "validate": ("val",)}.get(stage, (stage,))
        _require_images([self.dataset(split) for split in splits if split not in self._checked])
        self._checked.update(splits)

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
        if (stage == "fit" or self.table.split_is_ours) and self.table.digest != state_dict["digest"]:
            raise DataError(
                f"data: expected the images and the split that the checkpoint was trained with (digest "
                f"{state_dict['digest'][:12]}), found others in {self.table.root} (digest {self.table.digest[:12]}). "
                "With files, data.split_seed or fractions changed, images that were trained on would be tested on: "
                "restore them, test images of their own in test/<class> folders, or start a new run."
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

    def val_dataloader(self) -> DataLoader[Item]:
        return self._loader("val", DataLoader)

    def test_dataloader(self) -> DataLoader[Item]:
        return self._loader("test", DataLoader)

    def predict_dataloader(self) -> DataLoader[Item]:
        return self._loader("predict", DataLoader)

    def _loader(self, split: str, kind: type[Loader]) -> Loader:
        dataset = self.dataset(split)
        training = split == "train"
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        if len(dataset) < replicas:
            raise DataError(
                f"data: expected at least one image of {split} for each of {replicas} processes, found {len(dataset)}; "
                "use fewer devices."
            )
        sampler = EpochSampler(dataset, replicas, rank, training=training, seed=self.seed)
        workers = max(1, _cores() // replicas) if self.num_workers == "auto" else self.num_workers
        return kind(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            # A last batch of one image would leave batch normalisation without a variance.
            drop_last=training and len(sampler) >= self.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0 and split in ("train", "val"),
            worker_init_fn=worker_init,
            pin_memory=torch.cuda.is_available(),
        )


def _resolve_preprocessing(
    record: dict[str, Any] | None, image_size: int | Literal["auto"], crop_fraction: float | Literal["auto"]
) -> Preprocessing:
    if record is None:
        raise DataError(
            "data.preprocessing: expected the record that belongs to the model's weights, found none; "
            "pass pipeline.models.weights.preprocessing_record(backbone, weights)."
        )
    values = dict(record)
    if image_size != "auto":
        values["size"] = image_size
    if crop_fraction != "auto":
        values["crop"] = crop_fraction
    if values["size"] < 32:
        raise DataError(f"data.image_size: expected at least 32 pixels, found {values['size']}.")
    if not 0 < values["crop"] <= 1:
        raise DataError(f"data.crop_fraction: expected a share in (0, 1], found {values['crop']}.")
    return Preprocessing.from_dict(values)


def _require_images(datasets: Sequence[ImageDataset]) -> None:
    files = [dataset.root / path for dataset in datasets for path in dataset.paths]
    check = decode if len(files) <= MOST_DECODED else _read_head
    with ThreadPoolExecutor(_cores()) as pool:  # Pillow decodes without holding the interpreter's lock
        reasons = pool.map(partial(_reason_not_to_read, check), files)
        bad = [f"{file} ({why})" for file, why in zip(files, reasons, strict=True) if why is not None]
    if bad:
        shown = ", ".join(bad[:10]) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise DataError(
            f"data: expected {len(files):,} images that can be read, found {len(bad)} that cannot: {shown}; repair or "
            "remove them."
        )


def _read_head(path: Path) -> None:
    with Image.open(path):
        pass


def _reason_not_to_read(check: Callable[[Path], object], path: Path) -> str | None:
    try:
        check(path)
    except (OSError, Image.DecompressionBombError) as error:
        if path.is_file() and path.stat().st_size == 0:
            return "it is empty"
        return "it is no image" if isinstance(error, UnidentifiedImageError) else str(error)
    return None


def _cores() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_WORKERS, available or 1)
