"""Datasets of Hugging Face `datasets` on disk, for tests."""

import io
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Pillow

from datamodules.errors import DataError
from datamodules.huggingface import read_dataset


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", (4, 3), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(numbers: range, name: str | None = None) -> list[dict[str, Any]]:
    return [{"bytes": picture(n), "path": None if name is None else name.format(n)} for n in numbers]


def features(**others: Any) -> Features:
    return Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "emu"]), **others})


def saved(folder: Path, data: Dataset | DatasetDict, **options: Any) -> Path:
    datasets.disable_progress_bars()
    data.save_to_disk(str(folder / "saved"), **options)
    datasets.enable_progress_bars()
    return folder / "saved"


def complaint(folder: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_dataset(folder, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def divided_dataset(folder: Path) -> Path:
    """Ten training images, three validation images and two test images."""

    def part(numbers: range) -> Dataset:
        return Dataset.from_dict({"image": encoded(numbers), "label": [n % 3 for n in numbers]}, features=features())

    return saved(folder, DatasetDict(train=part(range(10)), validation=part(range(10, 13)), test=part(range(13, 15))))
