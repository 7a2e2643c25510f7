"""Whether a picture still shows the same in the mirror, upside down or on its side: asked of a probe on features.

A classifier that has seen pictures as they are is tried on held-out ones that were turned. Where it recognises them as
well, classes do not depend on the orientation, and training on turned pictures costs nothing and multiplies the data;
where it does not (digits, a cell's busbars, left and right lungs), it would be taught what is wrong.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from datamodules.transforms import Orientation
from pipeline.finetuning.probe import deal_folds, fit_probe

#: Share of the pictures that may be lost before a turn counts as one that matters, if that is not more than a quarter
#: of what is recognised beyond chance.
TOLERANCE, _OF_RECOGNISED = 0.04, 0.25
#: The largest standard error of what is lost with which a turn is allowed that photographs do not have anyway.
_UNSURE = 0.05
# Each orientation allows what those before it do, and one turn more: how it is called, and how it is made of
# ``(B, C, H, W)``.
TURNS: Mapping[Orientation, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "mirrored": ("in the mirror", lambda images: images.flip(3)),
    "flipped": ("upside down", lambda images: images.flip(2)),
    "any": ("on their side", lambda images: images.rot90(1, (2, 3))),
}


@dataclass(frozen=True)
class Recognised:
    """What a probe recognises of held-out pictures.

    Attributes:
        upright: share as they are.
        turned: share of the same pictures under each turn that was tried.
        errors: standard error of what is lost, by turn.
        images: their number.
        chance: share that is right for whoever always names the most frequent class.
    """

    upright: float
    turned: dict[Orientation, float]
    errors: dict[Orientation, float]
    images: int
    chance: float

    @property
    def orientation(self) -> Orientation:
        """The most that may be done to a picture."""
        allowed: Orientation = "upright"
        for turn, share in self.turned.items():
            error = self.errors[turn]
            unsure = error > _UNSURE or not self._could_lose
            if self.upright - share - error > self._tolerance or (turn != "mirrored" and unsure):
                break
            allowed = turn
        return allowed

    @property
    def _tolerance(self) -> float:
        if not self._could_lose:  # and what is lost says nothing either
            return TOLERANCE
        return min(TOLERANCE, _OF_RECOGNISED * (self.upright - self.chance))

    @property
    def _could_lose(self) -> bool:
        """Whether enough is recognised beyond chance that a turn which matters would show."""
        error = (self.upright * (1 - self.upright) / self.images) ** 0.5
        return self.upright - self.chance - error > TOLERANCE

    def in_words(self) -> str:
        """What was found."""
        shares = ", ".join(f"{TURNS[turn][0]} {share:.2f}" for turn, share in self.turned.items())
        blind = self.orientation == "mirrored" and not self._could_lose
        return (
            f"a probe recognises {self.upright:.2f} of {self.images:,} held-out training images as they are, {shares}"
            + (f"; too little beyond the {self.chance:.2f} of chance to tell what other turns cost" if blind else "")
        )


def try_turns(
    features: Mapping[Orientation | None, NDArray[np.float32]],
    targets: NDArray[np.int64],
    classes: int,
    together: Sequence[Hashable] | None,
    seed: int,
    widths: Sequence[int] | None = None,
) -> Recognised | None:
    """Try a probe on turned pictures that it has not seen in any position.

    Args:
        features: of the pictures as they are (under None) and under each turn, ``(N, F)`` each.
        targets: class of each picture, int64 ``(N,)``.
        classes: their number.
        together: pictures that share a value are held out together.
        seed: of the folds.
        widths: as for :func:`~pipeline.finetuning.probe.fit_probe`.

    Returns:
        None where there are too few pictures to hold any out.
    """
    truth = functional.one_hot(torch.from_numpy(targets), classes).float()
    folds = deal_folds(truth, together, seed)
    if folds is None:
        return None
    plain, labels = torch.from_numpy(features[None]), torch.from_numpy(targets)
    penalty = fit_probe(plain, labels, classes, None, together, seed=seed, widths=widths).penalty
    right = {turn: torch.zeros(len(labels)) for turn in features}
    for fold in folds.unique().tolist():
        held_out = folds == fold
        probe = fit_probe(plain[~held_out], labels[~held_out], classes, penalties=(penalty,), widths=widths)
        for turn, found in features.items():
            answers = (torch.from_numpy(found)[held_out] @ probe.weight.T + probe.bias).argmax(1)
            right[turn][held_out] = (answers == labels[held_out]).float()
    upright, turns = right[None], [turn for turn in TURNS if turn in features]
    count = len(labels)
    return Recognised(
        upright=float(upright.mean()),
        turned={turn: float(right[turn].mean()) for turn in turns},
        errors={turn: float((upright - right[turn]).std(correction=0)) / count**0.5 for turn in turns},
        images=count,
        chance=float(labels.bincount().max()) / count,
    )
