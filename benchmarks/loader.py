"""How fast training images are read on one core: ours, ours from the cache, torchvision's reference, bare decoding.

    PIPELINE_MATERIAL=... python benchmarks/loader.py             # the table, about four minutes
    PIPELINE_MATERIAL=... python benchmarks/loader.py --accuracy  # what it does to a model, about ten

All four read the same JPEG files in one process with one thread, in turn, several times over; each figure is the
median of the rounds, each ratio the median of the rounds' ratios. Three sets: (a) the trash photographs as they are,
short side 224 px; (b) enlarged to a short side of 500 px; (c) to 4,000 x 3,000 px. Enlarged photographs have less
detail than real ones of that size: their files are smaller and decode faster than a camera's would, alike for all.

Target 224 px, random resized crop of 8 to 100 % of the area, mirrored half of the time. "Bare decoding" is this
project's own decoder (the fastest of those tried) at full size and nothing else; Pillow's stands beside it.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported: one core for everybody

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from datamodules import ImageFolderDataModule
from datamodules.decode import decode
from pipeline.models.weights import preprocessing_record

SIZE, BATCH = 224, 16
RECORD = preprocessing_record("resnet18", None)
#: Name, size to enlarge to (None: as it is), how many photographs.
SETS: list[tuple[str, int | None, int]] = [("a", None, 600), ("b", 500, 240), ("c", 3000, 24)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is timed")
    parser.add_argument("--accuracy", action="store_true", help="train on fully, partly and never decoded images")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    if "PIPELINE_MATERIAL" not in os.environ:
        sys.exit("PIPELINE_MATERIAL: expected the folder with data/trashnet, found it unset.")
    images = Path(os.environ["PIPELINE_MATERIAL"]) / "data" / "trashnet" / "images"
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.accuracy:
            from benchmarks.loader_accuracy import compare

            result = compare(images, Path(scratch))
        else:
            result = {
                name: measure(make_set(images, Path(scratch) / name, short, count), Path(scratch), arguments.rounds)
                for name, short, count in SETS
            }
            print_table(result)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_set(images: Path, folder: Path, short: int | None, count: int) -> Path:
    """Photographs drawn evenly from the classes, enlarged so that their short side is ``short`` pixels."""
    files = sorted(images.glob("*/*.jpg"))
    for number, path in enumerate(random.Random(0).sample(files, count)):
        target = folder / ("even" if number % 2 else "odd") / f"{number:04}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        if short is None:
            target.write_bytes(path.read_bytes())
            continue
        with Image.open(path) as image:
            scale = short / min(image.size)
            enlarged = image.convert("RGB").resize(
                [round(side * scale) for side in image.size], Image.Resampling.BICUBIC
            )
        enlarged.save(target, quality=90)
    return folder


class Reference(Dataset[Any]):
    """torchvision's classification reference with Pillow (references/classification/presets.py of 0.29)."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.transform = T.Compose(
            [
                T.RandomResizedCrop(SIZE),
                T.RandomHorizontalFlip(),
                T.PILToTensor(),
                T.ConvertImageDtype(torch.float),
                T.Normalize(RECORD["mean"], RECORD["std"]),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with self.files[index].open("rb") as file:
            return self.transform(Image.open(file).convert("RGB")), 0


def ours(folder: Path, cache: Path | None) -> ImageFolderDataModule:
    crop = A.RandomResizedCrop(size=(SIZE, SIZE), scale=(0.08, 1.0))
    return ImageFolderDataModule(
        str(folder),
        batch_size=BATCH,
        train_transforms=[crop, A.HorizontalFlip(p=0.5)],
        val_fraction=0.05,
        test_fraction=0.05,
        num_workers=0,
        preprocessing=RECORD,
        cache=None if cache is None else str(cache),
        cache_gigabytes=50,
    )


def measure(folder: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds an image, by round."""
    plain, cached = ours(folder, None), ours(folder, scratch / f"cache_{folder.name}")
    started = time.perf_counter()
    loaders = {"ours": plain.train_dataloader(), "cached": cached.train_dataloader()}
    building = time.perf_counter() - started
    files = [plain.table.listing.storage.source(int(row)) for row in loaders["ours"].dataset.rows]
    loaders["torchvision"] = DataLoader(Reference(files), batch_size=BATCH, shuffle=True, drop_last=True)
    epochs = len(files) // BATCH * BATCH
    ways: dict[str, Callable[[], Iterable[Any]]] = {name: loader.__iter__ for name, loader in loaders.items()}
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            if name != "torchvision":
                loaders[name].sampler.set_epoch(number)
            times.setdefault(name, []).append(_seconds(lambda way=way: sum(1 for _ in way())) / epochs * 1e3)
        for name, read in (("bare decoding", decode), ("Pillow's decoding", _by_pillow)):
            times.setdefault(name, []).append(
                _seconds(lambda read=read: [read(file) for file in files]) / len(files) * 1e3
            )
    # The first round meets cold files and code.
    return {
        "images": len(files),
        "building_ms": building / len(files) * 1e3,
        "ms": {k: v[1:] for k, v in times.items()},
    }


def _by_pillow(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _seconds(work: Callable[[], object]) -> float:
    """Seconds that the work takes; what is short is repeated for a quarter of a second."""
    started, repeats = time.perf_counter(), 0
    while repeats == 0 or time.perf_counter() - started < 0.25:
        work()
        repeats += 1
    return (time.perf_counter() - started) / repeats


def print_table(result: dict[str, Any]) -> None:
    """Milliseconds and ratios, the median and the range of the rounds."""
    ways = ["ours", "cached", "torchvision", "bare decoding", "Pillow's decoding"]
    print(
        f"milliseconds an image, one core, median of rounds\n{'set':<5}{'images':>8}"
        + "".join(f"{w:>19}" for w in ways)
    )
    for name, found in result.items():
        row = "".join(f"{np.median(found['ms'][way]):>19.3f}" for way in ways)
        print(f"({name})  {found['images']:>8}{row}")
    print("\ntimes as fast, median [smallest, largest] of rounds")
    ratios = [
        ("ours", "torchvision"),
        ("ours", "bare decoding"),
        ("ours", "Pillow's decoding"),
        ("cached", "torchvision"),
    ]
    for way, other in ratios:
        for name, found in result.items():
            rounds = np.array(found["ms"][other]) / np.array(found["ms"][way])
            bounds = f"[{rounds.min():.2f}, {rounds.max():.2f}]"
            print(f"  ({name}) {way:<7} over {other:<18} {np.median(rounds):8.2f}  {bounds}")
    for name, found in result.items():
        print(f"  ({name}) building the cache, with decoding: {found['building_ms']:.2f} ms an image")


if __name__ == "__main__":
    main()
