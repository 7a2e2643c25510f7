"""A curved classifier on features of a frozen network: kernel ridge regression, solved to the optimum."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from pipeline.finetuning.probe import spreads
from pipeline.models.kernel_head import kernel

#: Widths of the kernel (see :func:`~pipeline.models.kernel_head.kernel`) and penalties that are tried.
WIDTHS, PENALTIES = (0.25, 0.5, 1.0), (0.3, 0.1, 0.03, 0.01)
#: Images that others are compared with, at most; all of them are where there are no more.
MOST_CENTRES = 2_000
# By which a feature is divided that never changes, and tells nothing; a checkpoint keeps no infinite number.
_CONSTANT = 1e30
# Of what is predicted, by which it becomes logits: natural logarithms of the least and the largest.
_SCALES = (-2.0, 5.0)
# Eigenvalues below this share of the largest are rounding.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class KernelRidge:
    """A solved head.

    Attributes:
        centres: standardised features, float32 ``(M, F)``.
        mean: of the features, float32 ``(F,)``.
        deviation: by which they are divided, float32 ``(F,)``.
        width: of the kernel.
        weight: float32 ``(C, M)``.
        bias: float32 ``(C,)``.
        penalty: that was chosen.
        left_out: logits of the training images, each answered as if its unit had been left out, float32 ``(N, C)``; NaN
            where none of its class would have been left.
    """

    centres: Tensor
    mean: Tensor
    deviation: Tensor
    width: float
    weight: Tensor
    bias: Tensor
    penalty: float
    left_out: Tensor

    def state(self) -> dict[str, Tensor]:
        """The tensors of a :class:`~pipeline.models.kernel_head.KernelHead`, by name."""
        names = ("centres", "mean", "deviation", "width", "weight", "bias")
        return {name: torch.as_tensor(getattr(self, name)) for name in names}


def fit_kernel_ridge(
    features: Tensor,
    targets: Tensor,
    classes: int,
    weights: Tensor | None = None,
    together: Sequence[Hashable] | None = None,
    seed: int = 0,
    widths: Sequence[int] | None = None,
) -> KernelRidge:
    """Least squares on one column a class, with the width and the penalty by which left-out images are told best.

    What is predicted for an image whose unit is left out follows from the solution with it (Rifkin and Lippert 2007,
    "Notes on regularized least squares", http://hdl.handle.net/1721.1/37318), so that nothing is solved anew. A scale
    makes logits of predictions; that, too, is the one by which these images have the smallest log loss. Of many images
    some are the centres, and stand for all of the kernel's functions (Williams and Seeger 2001, the Nystrom method).

    Args:
        features: ``(N, F)``.
        targets: int64 ``(N,)``.
        classes: how many there are; some may be absent.
        weights: of the images in the loss, float ``(N,)``, at least 0; none: all alike.
        together: images that share a value are left out together.
        seed: of the choice of centres.
        widths: how many features each stage of the network has, in their order; none: they are of one stage.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [1.0], [1.1], [2.0], [2.1]])
        >>> head = fit_kernel_ridge(features, torch.tensor([0, 0, 1, 1, 0, 0]), classes=2)  # no line tells these apart
        >>> near = kernel((features - head.mean) / head.deviation, head.centres, head.width)
        >>> (near @ head.weight.T + head.bias).argmax(1).tolist()
        [0, 0, 1, 1, 0, 0]
    """
    features, truth = features.double(), functional.one_hot(targets, classes).double()
    share = torch.ones(len(features)).double() if weights is None else weights.double() / weights.double().mean()
    mean = share @ features / share.sum()
    variances = share @ (features - mean) ** 2 / share.sum()
    deviation = spreads(variances, float((share > 0).sum()), widths).clamp_max(_CONSTANT)
    known = (features - mean) / deviation
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    centres = known[order[:MOST_CENTRES].sort().values]
    units, judged = _left_out_together(range(len(known)) if together is None else together, truth, share)
    counted = share if judged is None else share * judged
    prior = share @ truth / share.sum()
    best: tuple[float, float, float, float, Tensor, Tensor] | None = None
    for width in WIDTHS:
        problem = _Problem(known, centres, width, truth - prior, share)
        for penalty in PENALTIES:
            predicted = truth - problem.left_out(penalty, units)
            scale, loss = _fit_scale(predicted, targets, counted)
            if best is None or loss < best[0]:
                best = (loss, width, penalty, scale, scale * problem.solve(penalty), scale * predicted)
    assert best is not None
    _, width, penalty, scale, weight, left_out = best
    left_out[torch.ones(len(left_out), dtype=torch.bool) if judged is None else ~judged] = torch.nan
    return KernelRidge(
        centres.float(),
        mean.float(),
        deviation.float(),
        width,
        weight.T.float().contiguous(),
        (scale * prior).float(),
        penalty,
        left_out.float(),
    )


class _Problem:
    """Ridge regression on the functions that centres make.

    Args:
        known: standardised features, float64 ``(N, F)``.
        centres: some of them, ``(M, F)``.
        width: of the kernel.
        wanted: what is to be predicted, ``(N, C)``.
        share: of each image in the loss, ``(N,)``.
    """

    def __init__(self, known: Tensor, centres: Tensor, width: float, wanted: Tensor, share: Tensor) -> None:
        values, vectors = torch.linalg.eigh(kernel(centres, centres, width))
        kept = values > _ROUNDING * values[-1]
        functions = vectors[:, kept] / values[kept].sqrt()
        inputs = kernel(known, centres, width) @ functions
        self._values, directions = torch.linalg.eigh(inputs.T @ (share[:, None] * inputs))
        self._inputs, self._functions = inputs @ directions, functions @ directions
        self._wanted, self._share = wanted, share
        self._products = self._inputs.T @ (share[:, None] * wanted)

    def solve(self, penalty: float) -> Tensor:
        """Weights of the centres, ``(M, C)``."""
        return self._functions @ (self._products / (self._values + penalty)[:, None])

    def left_out(self, penalty: float, units: Sequence[Tensor]) -> Tensor:
        """What is wanted of each image, less what is predicted where its unit is left out, ``(N, C)``.

        Args:
            penalty: of the squares.
            units: rows of several images that are left out together; all others are left out one by one.
        """
        shrunk = 1 / (self._values + penalty)
        residual = self._wanted - self._inputs @ (self._products * shrunk[:, None])
        found = residual / (1 - self._share * (self._inputs**2 @ shrunk))[:, None]
        for rows in units:
            inputs = self._inputs[rows]
            pull = (inputs * shrunk) @ inputs.T * self._share[rows]
            found[rows] = torch.linalg.solve(torch.eye(len(rows)).double() - pull, residual[rows])
        return found


def _left_out_together(
    together: Sequence[Hashable], truth: Tensor, share: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """Rows of each unit of more than one image, and which images can be judged without their unit, bool ``(N,)``.

    One whose class is in its unit alone could only be told wrong. Where that leaves fewer than two classes, images are
    left out one by one, which says something of width and penalty, and nothing that could be told of the head: None.
    """
    number = {unit: place for place, unit in enumerate(dict.fromkeys(together))}
    of = torch.tensor([number[unit] for unit in together])
    weighed = share[:, None] * truth
    others = weighed.sum(0) - torch.zeros(len(number), truth.shape[1]).double().index_add(0, of, weighed)[of]
    judged = (others * truth).sum(1) > 1e-9
    if (truth[judged].sum(0) > 0).sum() < 2:
        return [], None
    order = torch.argsort(of, stable=True)
    counts = torch.bincount(of).tolist()
    return [rows for rows in order.split(counts) if len(rows) > 1], judged


def _fit_scale(predicted: Tensor, targets: Tensor, share: Tensor) -> tuple[float, float]:
    """The factor by which predictions make the best logits, and the log loss of these."""

    def loss(log_scale: float) -> float:
        losses = functional.cross_entropy(float(np.exp(log_scale)) * predicted, targets, reduction="none")
        return float(share @ losses / share.sum())

    found = minimize_scalar(loss, bounds=_SCALES, method="bounded")
    return float(np.exp(found.x)), float(found.fun)
