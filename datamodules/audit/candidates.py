"""Which images may be copies of each other: those whose coarse likenesses are nearest."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.audit.neighbours import nearest
from datamodules.audit.registration import cut

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

_FREQUENCIES = 8  # of the cosine transform, each way
#: Margins of the original that a copy may lack, on each side: the copy is compared with the original cut by each.
MARGINS = (0.0, 0.03, 0.06, 0.09, 0.15)
#: Ways to mirror and turn a picture: whether mirrored, then how many quarter turns.
ORIENTATIONS = ((False, 0), (True, 0), (False, 2), (True, 2), (False, 1), (False, 3), (True, 1), (True, 3))
_BEST = 2  # are looked at for each image, if they are at all alike
_LEAST_OF_BEST = 0.6
NEIGHBOURS = 12  # are looked at, if they are much alike
_LEAST_COSINE = 0.8
_BY_FEATURES = 3  # are looked at besides
_LEAST_TURNED = 0.97  # a turned copy is looked for uncropped
_LEAST_FEATURES = 0.7
_ENOUGH = 30  # images, to say what they share ...
_ENOUGH_FOR_ALL = 1000  # ... and not more than this of them


@dataclass(frozen=True)
class Candidates:
    """Pairs of images that are worth a closer look. Every array has one entry a pair.

    Attributes:
        original: row of the image of which the other may be a copy.
        copy: row of the other.
        margin: which of :data:`MARGINS` is cut off the original.
        orientation: which of :data:`ORIENTATIONS` gives the original from the copy.
        cosine: of the coarse likenesses.
    """

    original: Integers
    copy: Integers
    margin: Integers
    orientation: Integers
    cosine: Floats

    def __len__(self) -> int:
        return len(self.original)

    def __getitem__(self, which: slice | NDArray[np.bool_] | Integers) -> "Candidates":
        return Candidates(*(values[which] for values in self._arrays()))

    def _arrays(self) -> tuple[NDArray, ...]:
        return self.original, self.copy, self.margin, self.orientation, self.cosine

    def best_first(self) -> "Candidates":
        """The same, the most alike first."""
        return self[np.argsort(-self.cosine, kind="stable")]

    def best_of_each_pair(self) -> "Candidates":
        """One of each pair of images, whichever is called the original."""
        ordered = self.best_first()
        low, high = np.minimum(ordered.original, ordered.copy), np.maximum(ordered.original, ordered.copy)
        return ordered[np.unique(low * (high.max(initial=0) + 1) + high, return_index=True)[1]]

    def best_of_each_copy(self, sure: int, count: int, least: float) -> "Candidates":
        """The most alike originals of each copy: ``sure`` of them, and as many as ``count`` that reach ``least``."""
        ordered = self.best_first()
        ordered = ordered[
            np.unique(ordered.copy * (ordered.original.max(initial=0) + 1) + ordered.original, return_index=True)[1]
        ]
        ordered = ordered[np.lexsort((-ordered.cosine, ordered.copy))]
        rank = np.arange(len(ordered)) - np.searchsorted(ordered.copy, ordered.copy)
        return ordered[rank < np.where(ordered.cosine >= least, count, sure)]


def _join(parts: list[Candidates]) -> Candidates:
    return Candidates(*(np.concatenate(values) for values in zip(*(part._arrays() for part in parts), strict=True)))


def find_candidates(grey: NDArray[np.uint8], features: Floats | None = None) -> Candidates:
    """Pairs of images that may show the same.

    Each image is compared, as a possible copy, with all others as they are and with margins cut off, by the lowest
    frequencies of a cosine transform (a perceptual hash before it is cut down to bits); of what is most alike two to
    twelve are taken. Mirrored and turned copies are looked for uncropped. By features three more are taken.

    Args:
        grey: likenesses, uint8 ``(N, 64, 64)``.
        features: float32 ``(N, F)``, or None.

    Returns:
        Each pair of images once, with the margin and the orientation that suit it best.
    """
    common = _common(grey)
    cropped = [describe(grey, common, margin=margin) for margin in range(len(MARGINS))]
    found = [_alike(cropped[0], rows, NEIGHBOURS + 1, _LEAST_OF_BEST, margin, 0) for margin, rows in enumerate(cropped)]
    kept = [_join(found).best_of_each_copy(_BEST, NEIGHBOURS, _LEAST_COSINE)]
    for orientation in range(1, len(ORIENTATIONS)):
        turned = describe(grey, common, orientation=orientation)
        kept.append(_alike(turned, cropped[0], 2, _LEAST_TURNED, 0, orientation))
    if features is not None:
        centred = features - features.mean(0)
        unit = centred / (np.linalg.norm(centred, axis=1, keepdims=True) + 1e-12)
        kept.append(_with_best_margin(_alike(unit, unit, _BY_FEATURES + 1, _LEAST_FEATURES, 0, 0), cropped))
    return _join(kept).best_of_each_pair()


def _common(grey: NDArray[np.uint8]) -> Floats:
    """What images share, such as a background or a frame, and what therefore says nothing about two of them."""
    if len(grey) < _ENOUGH:
        return np.zeros(grey.shape[1:], np.float32)
    return np.median(grey[:: -(-len(grey) // _ENOUGH_FOR_ALL)], axis=0).astype(np.float32)


def orient(pictures: Floats, orientation: int) -> Floats:
    """Mirrored and turned pictures ``(P, n, n)``; ``orientation`` counts :data:`ORIENTATIONS`."""
    mirrored, turns = ORIENTATIONS[orientation]
    return np.rot90(pictures[..., ::-1] if mirrored else pictures, turns, axes=(-2, -1))


def describe(grey: NDArray[np.uint8], common: Floats, margin: int = 0, orientation: int = 0) -> Floats:
    """The lowest frequencies of likenesses but their mean, fine ones raised a little, each line of length 1.

    Args:
        grey: uint8 ``(N, n, n)``.
        common: what is subtracted, ``(n, n)``.
        margin: which of :data:`MARGINS` is cut off.
        orientation: which of :data:`ORIENTATIONS` they are brought into.

    Returns:
        float32 ``(N, 63)``.
    """
    side = grey.shape[1]
    waves = np.cos(np.pi * np.arange(_FREQUENCIES)[:, None] * (np.arange(side) + 0.5) / side).astype(np.float32)
    inner = np.array([[0, 1, 0, 1 - 2 * MARGINS[margin]]], np.float32)
    cutting = waves @ cut(np.eye(side, dtype=np.float32)[None], inner)[0][0]
    order = np.arange(_FREQUENCIES)
    gain = np.sqrt(np.hypot(order[:, None], order)).astype(np.float32)
    lines = np.empty((len(grey), _FREQUENCIES**2 - 1), np.float32)
    for start in range(0, len(grey), 4096):
        block = orient(grey[start : start + 4096].astype(np.float32), orientation)
        spectrum = cutting @ block @ cutting.T - waves @ common @ waves.T
        lines[start : start + 4096] = (spectrum * gain).reshape(len(block), -1)[:, 1:]
    return lines / (np.linalg.norm(lines, axis=1, keepdims=True) + 1e-6)


def _alike(copies: Floats, originals: Floats, count: int, least: float, margin: int, orientation: int) -> Candidates:
    nearest_rows, cosines = nearest(copies, originals, count)
    original, cosine = nearest_rows.ravel(), cosines.ravel()
    copy = np.repeat(np.arange(len(copies)), nearest_rows.shape[1])
    kept = (original != copy) & (cosine >= least)
    alike = Candidates(original, copy, np.full_like(copy, margin), np.full_like(copy, orientation), cosine)
    return alike[kept]


def _with_best_margin(pairs: Candidates, cropped: list[Floats]) -> Candidates:
    """Pairs that were found by features, each with the margin and the roles under which the likenesses agree best."""
    original = np.concatenate([pairs.original, pairs.copy])
    copy = np.concatenate([pairs.copy, pairs.original])
    cosines = np.stack([(rows[original] * cropped[0][copy]).sum(1) for rows in cropped])
    return Candidates(original, copy, cosines.argmax(0), np.zeros_like(copy), cosines.max(0))
