"""As how many images the variance that is typical of a stage should count where a solved head standardises features.

    PIPELINE_MATERIAL=... python benchmarks/spreads.py    # some half an hour on two cores

Networks, heads (on three stages), divisions and draws are those of ``benchmarks/head_stages.py``. Accuracy in per cent
and log loss, means over draws of 20 images a class (over divisions in full), and the log loss of the worst.
"""

import argparse

import numpy as np
import torch
from cases import FEW
from head_stages import NETWORKS, divisions, everything_seen
from torch import Tensor
from torch.nn import functional
from transfer import Workplace, add_work, material_folder

from pipeline.finetuning import probe

COUNTS = (0, 1, 4, 16)


def judge(stages: list[Tensor], targets: Tensor, train: list[int], test: list[int], seed: int) -> tuple[float, float]:
    """Accuracy in per cent and log loss of a head."""
    seen, widths = torch.cat(stages, dim=1), [stage.shape[1] for stage in stages]
    found = probe.fit_probe(seen[train], targets[train], int(targets.max()) + 1, seed=seed, widths=widths)
    logits = seen[test] @ found.weight.T + found.bias
    right = (logits.argmax(1) == targets[test]).float().mean()
    return 100 * float(right), float(functional.cross_entropy(logits, targets[test]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work(parser)
    workplace = Workplace(parser.parse_args().work.resolve(), material_folder(), None)
    print(f"| | {' | '.join(map(str, COUNTS))} |\n|---|{'---:|' * len(COUNTS)}")
    for name, source, images, stages, targets in everything_seen(workplace, NETWORKS):
        for few in (FEW, None):
            cells = []
            for probe._PRIOR_IMAGES in COUNTS:
                drawn = divisions(images, few)
                judged = np.array([judge(stages, targets, train, test, seed) for seed, train, test in drawn])
                (right, loss), worst = judged.mean(0), judged[:, 1].max()
                cells.append(f"{right:.1f}, {loss:.3f} ({worst:.2f})")
            kind = f"{source}, {'in full' if few is None else f'{few} a class'} ({len(judged)})"
            print(f"| {name.removeprefix('timm/tf_')}, {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
