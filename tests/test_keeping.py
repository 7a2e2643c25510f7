"""Decoded images on disk: evaluation gets the same bits, training the same picture, and no file is read again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.dataset import ImageDataset
from datamodules.sampling import EpochSampler
from datamodules.storage import FileStorage
from tests.images import epoch_of, folder_module, smooth

MANY = {"cat": 8, "dog": 8}


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """JPEGs that are much larger than the network's input."""
    for label, count in MANY.items():
        (tmp_path / "photographs" / label).mkdir(parents=True)
        for i in range(count):
            picture = Image.fromarray(smooth(300, 400, phase=i + len(label)))
            picture.save(tmp_path / "photographs" / label / f"{i}.jpg", quality=90)
    return tmp_path / "photographs"


def images_of(batches: list[dict[str, torch.Tensor]]) -> dict[int, np.ndarray]:
    return {
        int(index): image.permute(1, 2, 0).numpy()
        for batch in batches
        for image, index in zip(batch["image"], batch["index"], strict=True)
    }


def test_evaluation_is_the_same_to_the_bit(photographs: Path, tmp_path: Path) -> None:
    plain, kept = folder_module(photographs), folder_module(photographs, cache=str(tmp_path / "cache"))
    for split in ("val", "test"):
        (expected,) = list(getattr(plain, f"{split}_dataloader")())
        for _ in range(2):
            (found,) = list(getattr(kept, f"{split}_dataloader")())
            assert torch.equal(found["image"], expected["image"])
            assert torch.equal(found["target"], expected["target"])


def test_training_images_differ_by_their_resampling_alone(photographs: Path, tmp_path: Path) -> None:
    settings = {"train_transforms": "light", "seed": 3}
    plain = images_of(epoch_of(folder_module(photographs, **settings), 2))
    kept = images_of(epoch_of(folder_module(photographs, **settings, cache=str(tmp_path / "cache")), 2))
    assert sorted(kept) == sorted(plain)
    indices = sorted(kept)
    for index, another in zip(indices, indices[1:] + indices[:1], strict=True):
        assert np.abs(kept[index].astype(int) - plain[index]).mean() < 5
        assert np.abs(kept[index].astype(int) - plain[another]).mean() > 10


def test_a_second_epoch_and_a_second_run_open_no_file(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    first = folder_module(photographs, cache=cache)
    loader = first.train_dataloader()
    list(loader)
    again = folder_module(photographs, cache=cache)
    loaders = [loader, again.train_dataloader()]

    def refuse(*_: object) -> None:
        raise AssertionError("a file was read that is in the cache")

    monkeypatch.setattr(ImageDataset, "open_row", refuse)
    for each in loaders:
        each.sampler.set_epoch(1)
        assert len(list(each)) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_reading_processes_and_ranks_give_the_same_pictures(photographs: Path, tmp_path: Path, workers: int) -> None:
    settings = {"cache": str(tmp_path / "cache"), "train_transforms": "strong", "seed": 5}
    expected = images_of(epoch_of(folder_module(photographs, **settings), 1))
    found = images_of(epoch_of(folder_module(photographs, **settings, num_workers=workers), 1))
    assert sorted(found) == sorted(expected)
    assert all(np.array_equal(found[index], expected[index]) for index in expected)
    module = folder_module(photographs, **settings)
    dataset = module.train_dataloader().dataset
    for rank in (0, 1):
        sampler = EpochSampler(dataset, 2, rank, training=True, seed=5)
        sampler.set_epoch(1)
        for key in sampler:
            image = dataset[key]["image"].permute(1, 2, 0).numpy()
            assert key[1] not in expected or np.array_equal(image, expected[key[1]])


def test_a_changed_file_is_decoded_anew(photographs: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    before = folder_module(photographs, cache=cache)
    (first,) = list(before.test_dataloader())
    changed = before.table.listing.storage.source(int(before.table.rows("test")[0]))
    Image.fromarray(255 - smooth(300, 400)).save(changed, quality=90)
    (found,) = list(folder_module(photographs, cache=cache).test_dataloader())
    (expected,) = list(folder_module(photographs).test_dataloader())
    assert torch.equal(found["image"], expected["image"])
    assert not torch.equal(found["image"], first["image"])


def test_images_beyond_the_bound_are_decoded_each_time(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    source = FileStorage.source

    def remember(self: FileStorage, row: int) -> Path:
        opened.append(source(self, row))
        return opened[-1]

    module = folder_module(photographs, cache=str(tmp_path / "cache"), cache_gigabytes=2e-5)
    loader = module.test_dataloader()
    monkeypatch.setattr(FileStorage, "source", remember)
    (found,) = list(loader)
    (expected,) = list(folder_module(photographs).test_dataloader())
    assert torch.equal(found["image"], expected["image"])
    assert opened, "everything was kept: the bound was not met"
