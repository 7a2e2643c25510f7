"""What a solved head says of its own training images, out of fold, and what it is worth on others.

    PIPELINE_MATERIAL=... python benchmarks/out_of_fold.py    # some five minutes on two cores

Where few images are left to a head, none are held out: each is judged by a head that was solved without it, the
temperature is fitted to that, and images held out from each other say what is strange. All as ``fit`` does it, on
features of the last three stages (ResNet-18 with the material's weights, as they are, float32, images of 192 px, one
view), in 24 draws of each number of images from four divisions of those that ``benchmarks/defaults.py`` uses; groups of
near-duplicates, as the audit finds them, are held out together. All figures with 95 % intervals (Student's t over
draws, which share test images, so they are rather too narrow):

- out of fold: points of accuracy by which the training images are judged better (+) or worse (-) than the test's are;
- log loss: of the test, and what the temperature changes about it (-: better);
- strange: share of test images that are called strange, of which 5 % are expected, in per cent; of fewer than 20 images
  ``fit`` does not say it.
"""

import argparse

import numpy as np
import torch
from head_stages import divisions, everything_seen
from torch import Tensor
from torch.nn import functional
from transfer import Workplace, add_work, material_folder
from transfer_report import mean_of

from pipeline.evaluation.calibration import fit_temperature, tempered
from pipeline.evaluation.familiarity import STRANGE, Familiarity
from pipeline.evaluation.predictions import Predictions
from pipeline.finetuning.probe import deal_folds, fit_probe, judge_out_of_fold
from pipeline.finishing import LEAST_HELD_OUT

PER_CLASS = (8, 20, 60)


def predictions_of(logits: Tensor, targets: Tensor) -> Predictions:
    return Predictions(targets.numpy(), logits.double().softmax(dim=1).numpy())


def judge(
    stages: list[Tensor], targets: Tensor, groups: list[str], train: list[int], test: list[int], seed: int
) -> list[float]:
    """Points of accuracy out of fold beyond the test's, log loss, its change by the temperature, per cent strange."""
    seen, classes = torch.cat(stages, dim=1), int(targets.max()) + 1
    together, widths = [groups[row] for row in train], [stage.shape[1] for stage in stages]
    probe = fit_probe(seen[train], targets[train], classes, together=together, seed=seed, widths=widths)
    folds = deal_folds(functional.one_hot(targets[train], classes), together, seed)
    judged = judge_out_of_fold(seen[train], targets[train], classes, probe.penalty, folds, together, widths=widths)
    out_of_fold = predictions_of(judged, targets[train])
    tested = predictions_of(seen[test] @ probe.weight.T + probe.bias, targets[test])
    strange = torch.tensor([torch.nan])
    if len(set(together)) >= LEAST_HELD_OUT:
        familiarity = Familiarity.among([stage[train] for stage in stages], together)
        strange = (familiarity([stage[test] for stage in stages]) < STRANGE).float()
    loss = float(tested.losses.mean())
    return [
        100 * float(out_of_fold.right.mean() - tested.right.mean()),
        loss,
        float(tempered(tested, fit_temperature(out_of_fold)).losses.mean()) - loss,
        100 * float(strange.mean()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work(parser)
    workplace = Workplace(parser.parse_args().work.resolve(), material_folder(), None)
    print("| | images | out of fold | log loss | tempered | strange, % |\n|---|---:|---:|---:|---:|---:|")
    for _, source, images, stages, targets in everything_seen(workplace, [workplace.backbone]):
        groups = [image.group for image in images]
        for few in PER_CLASS:
            values = np.array(
                [judge(stages, targets, groups, train, test, seed) for seed, train, test in divisions(images, few)]
            )
            beyond, loss, change, strange = (mean_of([column.tolist()]) for column in values.T)
            cells = [f"{beyond.value:+.1f} ± {beyond.half:.1f}", f"{loss.value:.3f}"]
            cells.append(f"{change.value:+.4f} ± {change.half:.4f}")
            cells.append("" if np.isnan(strange.value) else f"{strange.value:.1f} ± {strange.half:.1f}")
            print(f"| {source}, {few} a class | {few * (int(targets.max()) + 1)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
