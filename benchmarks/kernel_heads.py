"""What a solved head gains where it may be curved: kernel ridge regression against a linear head, on frozen features.

    PIPELINE_MATERIAL=... python benchmarks/kernel_heads.py                          # prints a table in Markdown
    PIPELINE_MATERIAL=... python benchmarks/kernel_heads.py --images my_images       # images of your own

Both heads see the means of the last three stages of a network, of images of 256 px, in the divisions of
``benchmarks/head_stages.py``, all that train or so many of them. The linear one is that of ``fit``. The other answers
by a Gaussian kernel of the distances to all training images, in standardised features. It is solved by least squares;
its width, penalty and scale are those by which images are answered best that are left out, each with its group (Rifkin
and Lippert 2007, http://hdl.handle.net/1721.1/37318: no solution of its own is needed for each). ``fit`` has no such
head yet.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cases import FEW
from head_stages import NETWORKS, divisions, everything_seen
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional
from transfer import SOURCES, Workplace, add_work, material_folder
from transfer_report import mean_of

from pipeline.finetuning.probe import fit_probe
from pipeline.models.backbones import TIMM

SIZE = 256
#: Of the kernel, in units of the number of features, and of the squares of what is solved for.
WIDTHS, PENALTIES = (0.25, 0.5, 1.0), (0.3, 0.1, 0.03, 0.01)
_LOG_SCALES = (-2.0, 5.0)
#: Images that heads are solved on; none: all that there are.
COUNTS = (FEW, 360, None)


@dataclass(frozen=True)
class KernelHead:
    """A solved head.

    Attributes:
        centres: standardised features of the training images, float64 ``(N, F)``.
        mean: of the features, ``(F,)``.
        deviation: by which they are divided, ``(F,)``.
        width: of the kernel, in units of the number of features.
        weight: of each centre and class, ``(N, C)``.
        prior: of each class, ``(C,)``.
        scale: of what is predicted, which makes logits of it.
    """

    centres: Tensor
    mean: Tensor
    deviation: Tensor
    width: float
    weight: Tensor
    prior: Tensor
    scale: float

    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``(M, C)`` of features ``(M, F)``."""
        near = kernel((features.double() - self.mean) / self.deviation, self.centres, self.width)
        return self.scale * (near @ self.weight + self.prior)


def kernel(left: Tensor, right: Tensor, width: float) -> Tensor:
    return torch.exp(-width / left.shape[1] * torch.cdist(left, right) ** 2)


def fit_kernel_head(features: Tensor, targets: Tensor, classes: int, groups: Sequence[object]) -> KernelHead:
    """The head that predicts images best that are left out.

    Args:
        features: ``(N, F)``.
        targets: int64 ``(N,)``.
        classes: how many there are.
        groups: of each image; those of one are left out together.
    """
    features, truth = features.double(), functional.one_hot(targets, classes).double()
    mean, deviation, prior = features.mean(0), features.std(0) + 1e-3, truth.mean(0)
    centres, rest = (features - mean) / deviation, truth - prior
    together = [
        torch.tensor(rows)
        for rows in (np.flatnonzero(np.array(groups, dtype=object) == group) for group in dict.fromkeys(groups))
        if len(rows) > 1
    ]
    best = (np.inf, 0.0, 0.0, rest)
    for width in WIDTHS:
        values, vectors = torch.linalg.eigh(kernel(centres, centres, width))
        turned = vectors.T @ rest
        for penalty in PENALTIES:
            inverse = 1 / (values + penalty)
            weight = vectors @ (inverse[:, None] * turned)
            residual = weight / (vectors**2 @ inverse)[:, None]
            for rows in together:
                block = (vectors[rows] * inverse) @ vectors[rows].T
                residual[rows] = torch.linalg.solve(block, weight[rows])
            scale, loss = fit_scale(truth - residual, targets)
            if loss < best[0]:
                best = (loss, width, scale, weight)
    _, width, scale, weight = best
    return KernelHead(centres, mean, deviation, width, weight, prior, scale)


def fit_scale(predicted: Tensor, targets: Tensor) -> tuple[float, float]:
    """The factor by which predictions make the best logits, and the log loss of these."""

    def loss(log_scale: float) -> float:
        return float(functional.cross_entropy(float(np.exp(log_scale)) * predicted, targets))

    found = minimize_scalar(loss, bounds=_LOG_SCALES, method="bounded")
    return float(np.exp(found.x)), float(found.fun)


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
                head = fit_kernel_head(seen[rows], targets[rows], classes, groups)
                curved.append(judged(head(seen[test]), targets[test]))
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
