"""What the data audit finds of mistakes that were put into real photographs.

    python benchmarks/audit.py                  # needs PIPELINE_MATERIAL; a few minutes on one core
    python benchmarks/audit.py --sheet other.png   # and a picture of the pairs that nobody planted
    python benchmarks/audit.py --large          # how copies are found among 50,000 images, and how long that takes

Copies are planted among half of the photographs of waste, drawn by a fixed seed. Thresholds were set with other copies,
and with a look at all photographs. Prints, for each kind of copy, the share that is found; the pairs reported beside
them, which are repeats in the data or false alarms (look at the sheet); and of 5 % flipped labels the share among the
first tenth of the images ranked by doubt.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from datamodules.audit.candidates import find_candidates
from datamodules.audit.duplicates import find_duplicates
from datamodules.audit.inspection import inspect
from datamodules.audit.labels import judge_labels
from datamodules.contents import content_digest
from datamodules.decode import decode
from datamodules.preprocessing import Preprocessing
from datamodules.storage import MemoryStorage
from datamodules.table import list_images
from pipeline.finetuning.features import FeatureStore, extract_features, network_digest
from pipeline.models.backbones import create_backbone, default_preprocessing, features
from pipeline.models.weights import load_pretrained

Pixels = NDArray[np.uint8]

PLANTED = 120  # copies of each kind
SEEDS = (0, 1, 2)
KINDS = ("exact", "same pixels", "re-encoded", "resized", "cropped", "all three", "mirrored", "turned", "cropped a lot")


def copy_of(content: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """A copy as people make them: JPEG quality 30 to 95, 0.4 to 1.5 times the size, 2 to 10 % off each side."""
    if kind == "exact":
        return content
    image = Image.fromarray(decode(content))
    if kind == "same pixels":
        return encoded(image, "PNG")
    if kind in ("cropped", "all three", "cropped a lot"):
        low, high = (0.10, 0.20) if kind == "cropped a lot" else (0.02, 0.10)
        left, top, right, bottom = rng.uniform(low, high, 4)
        width, height = image.size
        box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
        image = image.crop(tuple(round(edge) for edge in box))
    if kind in ("resized", "all three"):
        scale = rng.uniform(0.4, 1.5)
        size = tuple(max(8, round(side * scale)) for side in image.size)
        image = image.resize(size, rng.choice([Image.Resampling.BILINEAR, Image.Resampling.LANCZOS]))
    if kind == "mirrored":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if kind == "turned":
        image = image.transpose(rng.choice([Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180]))
    quality = int(rng.integers(30, 96)) if kind in ("re-encoded", "all three") else 90
    return encoded(image, "JPEG", quality=quality)


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def duplicates(contents: list[bytes], of_network: NDArray[np.float32], sheet: Path | None) -> None:
    """Plant copies, look for them, and print what was found."""
    print(f"\ncopies planted among {len(contents):,} photographs, {PLANTED} of each kind, seeds {SEEDS}")
    found: Counter[str] = Counter()
    others: set[tuple[int, int]] = set()
    seconds = []
    for seed in SEEDS:
        rng = np.random.default_rng((7, seed))
        kinds = np.repeat(KINDS, PLANTED)
        originals = np.concatenate([rng.choice(len(contents), PLANTED, replace=False) for _ in KINDS])
        copies = [copy_of(contents[row], str(kind), rng) for row, kind in zip(originals, kinds, strict=True)]
        everything = [*contents, *copies]
        names = [f"{row}.jpg" for row in range(len(everything))]
        start = time.process_time()
        inspection = inspect(MemoryStorage(everything), names, workers=1)
        report = find_duplicates(inspection, names, ["train"] * len(names))
        seconds.append(time.process_time() - start)
        cluster_of = {row: number for number, cluster in enumerate(report.clusters) for row in cluster.rows}
        for number, (original, kind) in enumerate(zip(originals, kinds, strict=True)):
            copy = len(contents) + number
            found[str(kind)] += copy in cluster_of and cluster_of[copy] == cluster_of.get(int(original))
        source = {len(contents) + number: int(row) for number, row in enumerate(originals)}
        for cluster in report.clusters:
            for pair in cluster.pairs:
                one, other = sorted(source.get(row, row) for row in (pair.first, pair.second))
                others |= {(one, other)} if one != other else set()
    for kind in KINDS:
        total = PLANTED * len(SEEDS)
        print(f"  {kind:<14} {found[kind]:>4} of {total} found ({found[kind] / total:.1%})")
    print(f"  other pairs: {len(others)} of photographs (repeats in the data, or false alarms)")
    print(f"  {np.mean(seconds):.1f} s of processor time for {len(everything):,} images, on one thread")
    names = [str(row) for row in range(len(contents))]
    inspection = inspect(MemoryStorage(contents), [f"{name}.jpg" for name in names], workers=1)
    pairs = []
    for using in (None, of_network):
        clusters = find_duplicates(inspection, names, ["train"] * len(names), using).clusters
        pairs.append({(pair.first, pair.second) for cluster in clusters for pair in cluster.pairs})
    print(f"  without planted copies: {len(pairs[0])} pairs, with features as well {len(pairs[1])}")
    if sheet is not None:
        draw(sheet, sorted(others | pairs[0] | pairs[1]), contents)
        print(f"  wrote {sheet}")


def draw(file: Path, pairs: list[tuple[int, int]], contents: list[bytes], side: int = 140, columns: int = 5) -> None:
    """Pairs side by side."""
    page = Image.new("RGB", (columns * (2 * side + 12), -(-len(pairs) // columns) * (side + 18)), "white")
    ink = ImageDraw.Draw(page)
    for number, pair in enumerate(pairs):
        left, top = number % columns * (2 * side + 12), number // columns * (side + 18)
        for place, row in enumerate(pair):
            page.paste(Image.fromarray(decode(contents[row])).resize((side, side)), (left + place * side, top))
        ink.text((left, top + side + 2), f"{pair[0]} {pair[1]}", fill="black")
    page.save(file)


def labels(given: list[str], of_network: NDArray[np.float32]) -> None:
    """Flip labels, rank the images, and print how many flips come early."""
    print(f"\n5 % of {len(given):,} labels flipped, seeds 0 to 4")
    classes, truth = np.unique(given, return_inverse=True)
    early, precise, seconds = [], [], []
    for seed in range(5):
        rng = np.random.default_rng((11, seed))
        flipped = np.zeros(len(truth), bool)
        flipped[rng.choice(len(truth), round(0.05 * len(truth)), replace=False)] = True
        shifted = truth.copy()
        shifted[flipped] = (shifted[flipped] + rng.integers(1, len(classes), flipped.sum())) % len(classes)
        start = time.process_time()
        judged = judge_labels([(str(classes[code]),) for code in shifted], of_network, range(len(truth)), seed=seed)
        seconds.append(time.process_time() - start)
        first = np.argsort(judged.scores)[: len(truth) // 10]
        early.append(flipped[first].sum() / flipped.sum())
        precise.append(np.mean([flipped[suspect.row] for suspect in judged.suspects[:50]]))
    print(f"  among the first 10 %: mean {np.mean(early):.1%}, from {min(early):.1%} to {max(early):.1%}")
    print(f"  of the first 50 suspects: mean {np.mean(precise):.1%} were flipped (others may be wrong as they are)")
    print(f"  {np.mean(seconds):.1f} s of processor time")


def large(contents: list[bytes], count: int = 50_000) -> None:
    """Copies of crops, among so many that not every pair is compared."""
    from datamodules.audit import neighbours

    rng = np.random.default_rng(13)
    pictures = [decode(content) for content in contents]
    grey = np.stack([small(part_of(pictures[row % len(pictures)], rng)) for row in range(count - 1000)])
    source = rng.choice(len(grey), 1000, replace=False)
    noisy = grey[source].astype(float) + rng.normal(0, 4, grey[source].shape)
    cut = [
        np.asarray(Image.fromarray(image.clip(0, 255).astype(np.uint8)).resize((64, 64), box=(3, 2, 60, 61)))
        for image in noisy
    ]
    everything = np.concatenate([grey, np.stack(cut)])
    truth = {(int(row), len(grey) + number) for number, row in enumerate(source)}
    print(f"\n{count:,} crops, of which 1,000 are copies of others")
    for name, most in (("in cells", neighbours.MOST_COMPARED), ("every pair", count)):
        neighbours.MOST_COMPARED = most
        start = time.process_time()
        found = find_candidates(everything)
        pairs = set(zip(np.minimum(found.original, found.copy), np.maximum(found.original, found.copy), strict=True))
        print(
            f"  {name}: {len(truth & pairs) / len(truth):.1%} of the copies are candidates, of {len(found):,} pairs, "
            f"{time.process_time() - start:.0f} s of processor time"
        )


def part_of(picture: Pixels, rng: np.random.Generator) -> Pixels:
    height, width = picture.shape[:2]
    side = int(rng.uniform(0.3, 0.8) * min(height, width))
    top, left = rng.integers(0, height - side), rng.integers(0, width - side)
    return picture[top : top + side, left : left + side]


def small(picture: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(picture).convert("L").resize((64, 64)))


def network_features(contents: list[bytes], weights: Path) -> NDArray[np.float32]:
    """By ResNet-18 with ImageNet weights, as evaluation prepares images."""
    record = default_preprocessing("resnet18")
    network = create_backbone("resnet18", 2)
    load_pretrained(network, str(weights))
    preprocessing = Preprocessing.from_dict(record)
    mean, std = (torch.tensor(record[name]).view(1, 3, 1, 1) for name in ("mean", "std"))

    def read(rows: Sequence[int]) -> Iterator[torch.Tensor]:
        for row in rows:
            pixels = preprocessing.fit_to_size(decode(contents[row]))
            yield torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]

    def show(done: int, total: int) -> None:
        print(f"\rfeatures {done:,} of {total:,}", end="" if done < total else "\n", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder), network_digest(network), {"backbone": "resnet18", **record})
        digests = [content_digest(content) for content in contents]
        return extract_features(
            network, lambda images: features(network, (images / 255 - mean) / std), read, digests, store, progress=show
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    material = os.environ.get("PIPELINE_MATERIAL")
    if material is None:
        raise SystemExit("set PIPELINE_MATERIAL to the folder with data/trashnet and weights")
    root = Path(material) / "data/trashnet/images"
    paths = list_images(root, root)
    contents = [(root / path).read_bytes() for path in paths]
    if arguments.large:
        large(contents)
        return
    of_network = network_features(contents, Path(material) / "weights/resnet18_imagenet.fp16.safetensors")
    held_out = np.sort(np.random.default_rng(0).permutation(len(paths))[len(paths) // 2 :])
    duplicates([contents[row] for row in held_out], of_network[held_out], arguments.sheet)
    labels([path.split("/")[0] for path in paths], of_network)
    labels([paths[row].split("/")[0] for row in held_out], of_network[held_out])


if __name__ == "__main__":
    main()
