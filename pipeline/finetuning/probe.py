"""A linear classifier on features of a frozen network, solved to the optimum instead of trained by epochs."""

import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

#: Penalties that are tried, per image: the weight of half the squared norm of the classifier on standardised features.
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)
_FOLDS = 5
#: Few images are dealt into folds so often, each time anew, that this many are held out in all, or five times: once,
#: the luck of the draw says as much about a penalty as the images do.
_HELD_OUT, _MOST_DEALS = 1_000, 5
#: Penalties are compared on this many images at most; with more of them the choice hardly matters.
_COMPARED = 2_000
#: Weights that are solved for at once, at most: of more classes the memory is wanted, and there is less to gain.
_AT_ONCE = 200_000
#: As so many images the variance that is typical of a stage counts beside those at hand, where a feature's is told.
_PRIOR_IMAGES = 4
# When a solution is good enough: to be compared with others, and to be the classifier.
# (Stopped earlier, a weak penalty looks stronger than it is.)
_ROUGH, _FINE = {"maxiter": 300, "ftol": 1e-6}, {"maxiter": 1000, "ftol": 1e-8}
#: Standard errors of the difference in loss by which a stronger penalty may be behind the best. (Breiman et al. 1984
#: allow one.)
_ALLOWED = 0.5


@dataclass(frozen=True)
class Probe:
    """A solved head.

    Attributes:
        weight: float32 ``(C, F)``, for features as the network gives them.
        bias: float32 ``(C,)``.
        penalty: that was chosen.
        losses: mean log loss of held-out images, by penalty; empty where there was too little to hold out.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    losses: dict[float, float]


def fit_probe(
    features: Tensor,
    targets: Tensor,
    classes: int,
    weights: Tensor | None = None,
    together: Sequence[Hashable] | None = None,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
    widths: Sequence[int] | None = None,
    views: int = 1,
) -> Probe:
    """Penalised logistic regression, multinomial or one a class, with the penalty chosen by cross-validation.

    Features are standardised, with care where few images say how far they spread (see :func:`spreads`); the bias is
    not penalised. Each problem is solved by L-BFGS (Liu and Nocedal 1989) in the directions of the features' spread,
    scaled by Boehning's bound on the curvature (1992, https://doi.org/10.1007/BF00048682). From the middle penalty the
    search goes on to where held-out images are predicted better, each solution beginning with the one before; a
    stronger penalty is taken where the images cannot tell it from the best. Few images are dealt into folds several
    times.

    Args:
        features: ``(N, F)``.
        targets: int64 ``(N,)``, or float ``(N, C)`` in {0, 1} where an image may have several classes.
        classes: how many there are; some may be absent.
        weights: of the images in the loss, float ``(N,)``, at least 0; none: all alike.
        together: images that share a value are held out together.
        penalties: to choose from, each above 0.
        seed: of the folds.
        widths: how many features each stage of the network has, in their order; none: they are of one stage.
        views: rows that each image has.

    Example:
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> probe = fit_probe(features, torch.tensor([0, 0, 1, 1]), classes=2)
        >>> (features @ probe.weight.T + probe.bias).argmax(1).tolist()
        [0, 0, 1, 1]
    """
    with _one_thread():
        return _fit(features.float(), targets, classes, weights, together, penalties, seed, widths, views)


@contextmanager
def _one_thread() -> Iterator[None]:
    """What is multiplied here is small: several threads wait for each other twenty times as long as one computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def _fit(
    features: Tensor,
    targets: Tensor,
    classes: int,
    weights: Tensor | None,
    together: Sequence[Hashable] | None,
    penalties: Sequence[float],
    seed: int,
    widths: Sequence[int] | None,
    views: int,
) -> Probe:
    truth = as_truth(targets, classes)
    share = torch.ones(len(features)) if weights is None else weights.float()
    mean = share @ features / share.sum()
    variances = share @ (features - mean) ** 2 / share.sum()
    deviation = spreads(variances, int((share > 0).sum()) / views, widths)
    problem = _Problem((features - mean) / deviation, truth, multi_label=targets.ndim == 2)
    losses: dict[float, float] = {}
    penalty, start = sorted(penalties)[len(penalties) // 2], None
    deals = _deal_repeatedly(truth, together, seed) if len(penalties) > 1 else []
    if deals:
        held_out = _HeldOut(problem, share, deals, range(len(truth)) if together is None else together)
        penalty = held_out.choose(sorted(penalties))
        losses, start = held_out.losses, held_out.middle
    solved = problem.solve(share[None], penalty, _FINE, start).squeeze(1)
    weight = (solved[:-1] / deviation[:, None]).T.contiguous()
    return Probe(weight, solved[-1] - weight @ mean, penalty, losses)


def spreads(variances: Tensor, images: float, widths: Sequence[int] | None) -> Tensor:
    """The deviations that features are divided by, ``(F,)``; infinite for a constant, which tells nothing.

    A feature that few images hardly excite (a filter that waits for something which they do not show) seems to spread
    hardly at all, and another image may lie a hundred deviations away. So the median variance of the stage counts as
    some more images (Opgen-Rhein and Strimmer 2007, https://doi.org/10.2202/1544-6115.1252, shrink variances towards
    their median); of many images it changes nothing.

    Args:
        variances: of the features, ``(F,)``.
        images: that they were measured on.
        widths: as for :func:`fit_probe`.
    """
    told = variances > 1e-12 * variances.max()
    shrunk = []
    for own, known in zip(*(each.split(list(widths or (len(variances),))) for each in (variances, told)), strict=True):
        typical = own[known].median() if known.any() else 0.0
        shrunk.append((images * own + _PRIOR_IMAGES * typical) / (images + _PRIOR_IMAGES))
    return torch.where(told, torch.cat(shrunk).sqrt(), torch.inf)


def _deal_repeatedly(truth: Tensor, together: Sequence[Hashable] | None, seed: int) -> list[Tensor]:
    """Folds, dealt several times where there are few images; none where there is too little to hold any out."""
    number = max(1, min(_MOST_DEALS, -(-_HELD_OUT // len(truth))))
    deals = [deal_folds(truth, together, draw) for draw in range(seed * number, (seed + 1) * number)]
    return [folds for folds in deals if folds is not None]


def deal_folds(truth: Tensor, together: Sequence[Hashable] | None, seed: int) -> Tensor | None:
    """Cut images into up to five folds, by class and by group.

    Args:
        truth: of each image and class, 0 or 1, ``(N, C)``.
        together: images that share a value come into one fold; none: each on its own.
        seed: of the draw.

    Returns:
        The fold of each image, int64 ``(N,)``, -1 for those beyond 2,000; None: too little to hold anything out.
    """
    rows = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))[:_COMPARED].sort().values
    rarest = torch.where(truth[rows] > 0, truth.sum(0), torch.inf).argmin(1)
    unit = rows.tolist() if together is None else [together[row] for row in rows.tolist()]
    number = {value: place for place, value in enumerate(dict.fromkeys(unit))}
    folds = min(_FOLDS, len(number), int(rarest.bincount().max()))
    if folds < 2:
        return None
    # Groups are dealt one by one, which takes a second for 2,000 images; so only where there are groups.
    kind = StratifiedKFold if len(number) == len(unit) else StratifiedGroupKFold
    splitter = kind(folds, shuffle=True, random_state=seed % 2**32)
    fold = torch.full((len(truth),), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with few images is missing from some folds
        for place, (_, held_out) in enumerate(splitter.split(rows[:, None], rarest, [number[value] for value in unit])):
            fold[rows[held_out]] = place
    return fold


def join_folds(folds: Tensor, together: Sequence[Hashable]) -> Tensor:
    """One fold in place of several, where the images beyond it are enough to solve a head on.

    Args:
        folds: of each image, from :func:`deal_folds`, int64 ``(N,)``.
        together: what images share that are held out together, ``N``.

    Returns:
        The same, or all of them 0 where that leaves four fifths of the images, as each of five folds does.
    """
    dealt = {unit for unit, fold in zip(together, folds.tolist(), strict=True) if fold >= 0}
    held_out = sum(unit in dealt for unit in together)
    return folds.clamp_max(0) if held_out * _FOLDS <= len(together) else folds


def judge_out_of_fold(
    features: Tensor,
    targets: Tensor,
    classes: int,
    penalty: float,
    folds: Tensor,
    together: Sequence[Hashable],
    weights: Tensor | None = None,
    widths: Sequence[int] | None = None,
    views: int = 1,
) -> Tensor:
    """What heads say of images that they were solved without (Stone 1974, cross-validatory prediction).

    For each fold a head of its own is solved on all rows that share nothing with it, standardisation included.

    Args:
        features: ``(N, F)``.
        targets: as for :func:`fit_probe`.
        classes: how many there are.
        penalty: of all heads.
        folds: of each row, int64 ``(N,)``; -1: it is not judged.
        together: what rows share that are held out together, ``N``.
        weights: of the images in the loss, float ``(N,)``.
        widths: as for :func:`fit_probe`.
        views: as there.

    Returns:
        Logits, float32 ``(N, C)``; NaN where a row is not judged, where its head has seen rows of one class alone or
        none of its class, or, where there may be several, none without a class that it lacks.

    Example:
        >>> features = torch.tensor([[0.0], [0.2], [3.0], [3.2]])
        >>> targets, folds = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
        >>> judge_out_of_fold(features, targets, 2, 0.1, folds, range(4)).argmax(1).tolist()
        [0, 0, 1, 1]
    """
    judged = torch.full((len(features), classes), torch.nan)
    truth = as_truth(targets, classes)
    with _one_thread():
        for fold in folds[folds >= 0].unique():
            held_out = {unit for unit, own in zip(together, (folds == fold).tolist(), strict=True) if own}
            seen = torch.tensor([unit not in held_out for unit in together])
            share = None if weights is None else weights[seen]
            present, absent = (truth[seen] > 0).any(0), (truth[seen] == 0).any(0)
            if not (present & absent).any():
                continue  # told from nothing, every image would be certain
            head = _fit(features[seen].float(), targets[seen], classes, share, None, [penalty], 0, widths, views)
            # A class that all rows have, or none has, is never found absent, or present, in others.
            rows = (folds == fold) & (truth <= present).all(1)
            if targets.ndim == 2:
                rows &= (truth >= ~absent).all(1)
            judged[rows] = features[rows].float() @ head.weight.T + head.bias
    return judged


def as_truth(targets: Tensor, classes: int) -> Tensor:
    """Which classes each image has, float32 ``(N, C)`` in {0, 1}; targets as for :func:`fit_probe`."""
    return functional.one_hot(targets, classes).float() if targets.ndim == 1 else targets.float()


class _HeldOut:
    """Losses of held-out images under one penalty or another.

    Args:
        problem: to solve.
        share: of each image in the loss, ``(N,)``.
        deals: folds of each image, ``(N,)`` each.
        together: what images share that are held out together, ``N``.
    """

    def __init__(
        self, problem: "_Problem", share: Tensor, deals: Sequence[Tensor], together: Sequence[Hashable]
    ) -> None:
        self._problem = problem
        self._rows = (torch.stack(list(deals)) >= 0).any(0).nonzero().squeeze(1)
        each = [(folds, fold) for folds in deals for fold in folds[folds >= 0].unique()]
        held_out = torch.stack([folds == fold for folds, fold in each])
        dealt = torch.stack([folds >= 0 for folds, _ in each])
        used = (dealt & ~held_out) * share
        self._held_out = (held_out * share)[:, self._rows]
        at_once = max(1, _AT_ONCE // (problem.inputs.shape[1] * problem.truth.shape[1]))
        self._used = used.split(at_once)
        number = {unit: place for place, unit in enumerate(dict.fromkeys(together))}
        self._unit = torch.tensor([number[unit] for unit in together])[self._rows]
        # Under the penalty before, where the next one begins.
        self._solved: list[Tensor | None] = [None] * len(self._used)
        self._of_units: dict[float, Tensor] = {}

    @property
    def losses(self) -> dict[float, float]:
        """Means by penalty, of those that were tried."""
        return {
            penalty: float(self._of_units[penalty].sum() / self._held_out.sum()) for penalty in sorted(self._of_units)
        }

    @property
    def middle(self) -> Tensor:
        """Of the classifiers that were solved last, ``(F + 1, 1, C)``; there are none before the first penalty."""
        return torch.cat([solved for solved in self._solved if solved is not None], 1).mean(1, keepdim=True)

    def choose(self, penalties: Sequence[float]) -> float:
        """The strongest penalty that is as good as the best one, as far as these images can tell.

        From the middle one the search goes on to where the loss falls.

        Args:
            penalties: in order.
        """
        place, found = -1, len(penalties) // 2
        while place != found:
            place = found
            near = range(max(0, place - 1), min(len(penalties), place + 2))
            found = min(near, key=lambda each: float(self._try(penalties[each]).sum()))
        best = self._try(penalties[found])
        for stronger in penalties[found + 1 :]:
            behind = self._try(stronger) - best
            if not behind.sum() <= _ALLOWED * behind.std() * len(behind) ** 0.5:
                break
            found += 1
        return penalties[found]

    def _try(self, penalty: float) -> Tensor:
        """The summed loss of each unit."""
        if penalty not in self._of_units:
            losses = []
            for place, used in enumerate(self._used):
                solved = self._problem.solve(used, penalty, _ROUGH, self._solved[place])
                losses.append(self._problem.losses(solved, self._rows))
                self._solved[place] = solved
            total = (torch.cat(losses, 1).T * self._held_out).sum(0)
            self._of_units[penalty] = torch.zeros(int(self._unit.max()) + 1).index_add(0, self._unit, total)
        return self._of_units[penalty]


class _Problem:
    """Images to be told apart by a linear classifier.

    Args:
        features: standardised, float32 ``(N, F)``.
        truth: ``(N, C)`` in {0, 1}.
        multi_label: sigmoids in place of the softmax.
    """

    def __init__(self, features: Tensor, truth: Tensor, multi_label: bool) -> None:
        self.truth, self.multi_label = truth, multi_label
        self.spread, self.directions = _directions(features)
        self.inputs = torch.cat([features @ self.directions, torch.ones(len(features), 1)], 1)

    def losses(self, solved: Tensor, rows: Tensor) -> Tensor:
        """Of some images under each of K classifiers ``(F + 1, K, C)`` whose last row is the bias, ``(R, K)``.

        Args:
            solved: the classifiers.
            rows: of the images, int64 ``(R,)``.
        """
        logits = torch.tensordot(self.inputs[rows], self._turned(solved, self.directions.T), 1)
        return self._losses(logits, self.truth[rows, None])

    def solve(self, shares: Tensor, penalty: float, stopping: dict[str, float], start: Tensor | None = None) -> Tensor:
        """The best classifiers ``(F + 1, K, C)``; the last row is the bias.

        All at once: one pass over the images serves all of them, and for five takes about twice as long as for one.

        Args:
            shares: of each image in the loss of each classifier, ``(K, N)``.
            penalty: half of which weighs the squared norm.
            stopping: options of L-BFGS.
            start: where to begin.
        """
        rows = shares.sum(0).nonzero().squeeze(1)
        inputs, truth, share = self.inputs[rows], self.truth[rows, None], (shares / shares.sum(1, True))[:, rows].T
        bound = 0.25 if self.multi_label else 0.5
        scale = torch.cat([bound * self.spread + penalty, torch.tensor([bound])]).rsqrt()[:, None, None]
        penalties = torch.cat([torch.full_like(self.spread, penalty), torch.zeros(1)])[:, None, None]
        shape = len(scale), len(shares), truth.shape[2]

        def loss_and_slope(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            point = torch.from_numpy(flat).float().view(shape) * scale
            logits = torch.tensordot(inputs, point, 1)
            error = ((logits.sigmoid() if self.multi_label else logits.softmax(2)) - truth) * share[..., None]
            loss = (self._losses(logits, truth) * share).double().sum() + (penalties * point**2).double().sum() / 2
            slope = (torch.tensordot(inputs.T, error, 1) + penalties * point) * scale
            return float(loss), slope.flatten().double().numpy()

        begin = torch.zeros(shape) if start is None else self._turned(start, self.directions.T) / scale
        found = minimize(
            loss_and_slope, begin.flatten().double().numpy(), jac=True, method="L-BFGS-B", options=stopping
        )
        return self._turned(torch.from_numpy(found.x).float().view(shape) * scale, self.directions)

    def _losses(self, logits: Tensor, truth: Tensor) -> Tensor:
        if self.multi_label:
            return functional.binary_cross_entropy_with_logits(logits, truth.expand_as(logits), reduction="none").sum(2)
        return -(logits.log_softmax(2) * truth).sum(2)

    @staticmethod
    def _turned(solved: Tensor, by: Tensor) -> Tensor:
        return torch.cat([torch.tensordot(by, solved[:-1], 1), solved[-1:]])


def _directions(features: Tensor) -> tuple[Tensor, Tensor]:
    """Variances and directions of the features' spread, ``(D,)`` and ``(F, D)``, without those that have none.

    From the smaller of the two products of the features with themselves, and in float64: many equal eigenvalues, as
    where there are fewer images than features, are too much for float32.
    """
    exact = features.double() / len(features) ** 0.5
    few = len(features) < features.shape[1]
    spread, found = torch.linalg.eigh(exact @ exact.T if few else exact.T @ exact)
    kept = spread > 1e-6 * spread[-1].clamp_min(torch.finfo(torch.float32).tiny)
    spread, found = spread[kept], found[:, kept]
    directions = exact.T @ found / spread.sqrt() if few else found
    return spread.float(), directions.float()
