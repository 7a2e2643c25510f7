"""What a solved head gains where it may be curved: kernel ridge regression against a linear head, on frozen features.

    PIPELINE_MATERIAL=... python benchmarks/kernel_heads.py                          # prints a table in Markdown
    PIPELINE_MATERIAL=... python benchmarks/kernel_heads.py --images my_images       # images of your own

Both heads see the means of the last three stages of a network, of images of 256 px, in the divisions of
``benchmarks/head_stages.py``, all that train or so many of them. The linear one is that of ``LinearProbe``, the other
that of ``KernelProbe``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from cases import FEW
from head_stages import NETWORKS, divisions, everything_seen
from torch import Tensor
from torch.nn import functional
from transfer import SOURCES, Workplace, add_work, material_folder
from transfer_report import mean_of

from pipeline.finetuning.kernel_ridge import KernelRidge, fit_kernel_ridge
from pipeline.finetuning.probe import fit_probe
from pipeline.models.backbones import TIMM
from pipeline.models.kernel_head import kernel

SIZE = 256
#: Images that heads are solved on; none: all that there are.
COUNTS = (FEW, 360, None)


def logits(head: KernelRidge, features: Tensor) -> Tensor:
    """What a head answers to features ``(N, F)``, ``(N, C)``."""
    near = kernel((features - head.mean) / head.deviation, head.centres, head.width)
    return near @ head.weight.T + head.bias


def judged(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Accuracy in per cent, and log loss."""
    right = (logits.argmax(1) == targets).double().mean()
    return 100 * float(right), float(functional.cross_entropy(logits, targets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=Path, default=[], metavar="FOLDER", help="of class folders")
    add_work(parser)
    arguments = parser.parse_args()
    own = {folder.name: folder.resolve() for folder in arguments.images}
    workplace = Workplace(arguments.work.resolve(), material_folder(), None, own=own)
    print("| | linear: accuracy | log loss | kernel: accuracy | log loss |")
    print("|---|---:|---:|---:|---:|")
    for name, source, images, stages, targets in everything_seen(workplace, NETWORKS, list(own) or SOURCES, SIZE):
        seen, widths = torch.cat(stages, dim=1), [stage.shape[1] for stage in stages]
        classes = int(targets.max()) + 1
        for count in COUNTS:
            linear, curved = [], []
            for seed, train, test in divisions(images, FEW if count == FEW else None):
                rows = train
                if count not in (FEW, None):
                    chosen = np.random.default_rng((count, seed)).permutation(len(train))[:count]
                    rows = [train[place] for place in chosen]
                groups = [images[row].group for row in rows]
                probe = fit_probe(seen[rows], targets[rows], classes, together=groups, seed=seed, widths=widths)
                linear.append(judged(seen[test] @ probe.weight.T + probe.bias, targets[test]))
                head = fit_kernel_ridge(seen[rows], targets[rows], classes, together=groups, seed=seed, widths=widths)
                curved.append(judged(logits(head, seen[test]), targets[test]))
            before, after = np.array(linear), np.array(curved)
            gained, lost = (mean_of([(after - before)[:, column].tolist()]) for column in (0, 1))
            kind = "in full" if count is None else f"{count} a class" if count == FEW else f"{count} images"
            print(
                f"| {name.removeprefix(TIMM)}, {source}, {kind} ({len(linear)}) | {before[:, 0].mean():.1f} "
                f"| {before[:, 1].mean():.3f} | {gained.value:+.1f} ± {gained.half:.1f} "
                f"| {lost.value:+.3f} ± {lost.half:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
