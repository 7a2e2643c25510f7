"""The same picture more than once: identical files, identical pixels, and copies that were changed a little."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.audit.candidates import MARGINS, ORIENTATIONS, Candidates, find_candidates, orient
from datamodules.audit.inspection import Inspection, Progress
from datamodules.audit.registration import colour, displaced, register, shared, structure
from datamodules.audit.ties import first_of_tied
from datamodules.splits import SPLITS

Floats = NDArray[np.float32]
Kind = Literal["identical file", "same pixels", "near"]

#: Least similarity of a near duplicate.
NEAR = 0.83
# The same simple thing, put down elsewhere, can be laid over itself, too. Of pictures that share less than this of what
# they show (a twentieth cut off each side leaves 0.81), more must agree: by so much for each unit less.
_MOSTLY_SHARED = 0.85
_MORE_AGREEMENT = 0.5
_MOST_NEEDED = 0.93
#: Pictures that vary less, as a standard deviation in grey levels, have nothing to compare.
FLAT = 2.0
_SURELY_PLACED = 0.8  # cosine of coarse likenesses
_BATCH = 256
# More images than this, or than this share of all, that look alike are no copies: they show what a camera always sees.
_LARGEST_CLUSTER = 30
_LARGEST_SHARE = 0.02


@dataclass(frozen=True)
class Pair:
    """Two images that show the same.

    Attributes:
        first: row of one.
        second: row of the other.
        kind: how alike they are.
        similarity: in [-1, 1]; 1 where the pixels are the same.
        turned: how the second was mirrored or turned; empty: not at all.
    """

    first: int
    second: int
    kind: Kind
    similarity: float
    turned: str = ""


@dataclass(frozen=True)
class Cluster:
    """Images that are linked by pairs.

    Attributes:
        rows: of the images, in order.
        pairs: that link them; not every two of them need be alike.
        splits: that they are in.
        labels: that they have.
    """

    rows: tuple[int, ...]
    pairs: tuple[Pair, ...]
    splits: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """The loosest of the pairs' kinds."""
        return max((pair.kind for pair in self.pairs), key=("identical file", "same pixels", "near").index)

    @property
    def similarity(self) -> float:
        """The least of the pairs' similarities."""
        return min(pair.similarity for pair in self.pairs)

    @property
    def leaks(self) -> bool:
        """Whether they are in more than one split."""
        return len(self.splits) > 1

    @property
    def conflict(self) -> bool:
        """Whether their labels differ."""
        return len(self.labels) > 1


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Attributes:
        clusters: copies of the same picture: those that cross splits first, then those whose labels differ.
        families: so many images that look alike that copies among them cannot be told from what the camera always
            sees; only identical ones among them are in ``clusters``.
    """

    clusters: list[Cluster]
    families: list[Cluster]


def find_duplicates(
    inspection: Inspection,
    labels: Sequence[str],
    splits: Sequence[str],
    features: Floats | None = None,
    progress: Progress | None = None,
) -> Duplicates:
    """Find images that show the same picture.

    Near duplicates are verified: of each two that may be copies, one is laid over the other, with a search for the part
    that it shows. What agrees of structure and of colour, multiplied, must reach 0.83, and up to 0.93 where they share
    less than 0.85 of what they show.

    Args:
        inspection: of all images; what cannot be read is left out.
        labels: of each image.
        splits: of each image, ``train``, ``val`` or ``test``.
        features: a network's, float32 ``(N, F)``: further candidates for near duplicates.
        progress: called with how many candidates are verified, and of how many.
    """
    exact = list(_exact_pairs(inspection))
    standing_for = np.arange(len(labels))
    for pair in exact:
        standing_for[pair.second] = pair.first
    flat = inspection.grey.std((1, 2)) < FLAT  # as that of an unreadable image is
    rows = np.flatnonzero((standing_for == np.arange(len(labels))) & ~flat)
    near = _near_pairs(inspection, rows, None if features is None else features[rows], progress)
    largest = max(_LARGEST_CLUSTER, _LARGEST_SHARE * len(rows))
    components = _components(near, len(labels))
    families = [pairs for pairs in components if len(_rows(pairs)) > largest]
    in_families = {id(pair) for pairs in families for pair in pairs}
    kept = [*exact, *(pair for pair in near if id(pair) not in in_families)]
    clusters = [_cluster(pairs, labels, splits) for pairs in _components(kept, len(labels))]
    clusters.sort(key=lambda cluster: (not cluster.leaks, not cluster.conflict, -cluster.similarity, cluster.rows))
    return Duplicates(clusters, [_cluster(pairs, labels, splits) for pairs in families])


def _exact_pairs(inspection: Inspection) -> Iterator[Pair]:
    """Each further image with the same pixels, with the first of them."""
    first_of: dict[Hashable, int] = {}
    for row, fact in enumerate(inspection.facts):
        if fact.problem is not None:
            continue
        first = first_of.setdefault(fact.pixel_digest, row)
        if first != row:
            same_file = fact.digest == inspection.facts[first].digest
            yield Pair(first, row, "identical file" if same_file else "same pixels", 1.0)


def _near_pairs(
    inspection: Inspection, rows: NDArray[np.int64], features: Floats | None, progress: Progress | None
) -> list[Pair]:
    if len(rows) < 2:
        return []
    grey, chroma = inspection.grey[rows], inspection.chroma[rows]
    candidates = find_candidates(grey, features)
    found = []
    for start in range(0, len(candidates), _BATCH):
        batch = candidates[start : start + _BATCH]
        similarity, needed = _similarity(batch, grey, chroma)
        for number in np.flatnonzero(similarity >= needed):
            pair = sorted((int(rows[batch.original[number]]), int(rows[batch.copy[number]])))
            turned = _in_words(int(batch.orientation[number]))
            found.append(Pair(pair[0], pair[1], "near", round(float(similarity[number]), 4), turned))
        if progress is not None:
            progress(min(start + _BATCH, len(candidates)), len(candidates))
    return found


def _similarity(pairs: Candidates, grey: NDArray[np.uint8], chroma: NDArray[np.uint8]) -> tuple[Floats, Floats]:
    """How alike the two of each pair are, and how alike they must be to count: ``(P,)`` each."""
    margins = np.array(MARGINS, np.float32)[pairs.margin]
    zero = np.zeros_like(margins)
    first, second = grey[pairs.original].astype(np.float32), _turned(grey, pairs)
    regions = register(first, second, np.stack([zero, 1 - 2 * margins, zero, 1 - 2 * margins], 1))
    alike = structure(first, second, regions)
    lost = np.flatnonzero((pairs.cosine < _SURELY_PLACED) & (alike < NEAR))  # perhaps they began too far apart
    moved = register(first[lost], second[lost], displaced(first[lost], second[lost]))
    now = structure(first[lost], second[lost], moved)
    better = now > alike[lost]
    regions[lost[better]], alike[lost[better]] = moved[better], now[better]
    alike *= colour(chroma[pairs.original].astype(np.float32), _turned(chroma, pairs), regions)
    needed = np.clip(NEAR + _MORE_AGREEMENT * (_MOSTLY_SHARED - shared(regions)), NEAR, _MOST_NEEDED)
    return alike, needed


def _turned(pictures: NDArray[np.uint8], pairs: Candidates) -> Floats:
    copies = pictures[pairs.copy].astype(np.float32)
    for orientation in np.unique(pairs.orientation[pairs.orientation > 0]):
        chosen = pairs.orientation == orientation
        copies[chosen] = orient(copies[chosen], int(orientation))
    return copies


def _in_words(orientation: int) -> str:
    mirrored, turns = ORIENTATIONS[orientation]
    words = [*(["mirrored"] if mirrored else []), *([f"turned by {90 * turns} degrees"] if turns else [])]
    return " and ".join(words)


def _components(pairs: Sequence[Pair], count: int) -> list[list[Pair]]:
    """Pairs that are linked by images, together."""
    first = first_of_tied(count, [(pair.first, pair.second) for pair in pairs])
    parts: dict[int, list[Pair]] = {}
    for pair in pairs:
        parts.setdefault(first[pair.first], []).append(pair)
    return list(parts.values())


def _rows(pairs: Sequence[Pair]) -> tuple[int, ...]:
    return tuple(sorted({row for pair in pairs for row in (pair.first, pair.second)}))


def _cluster(pairs: Sequence[Pair], labels: Sequence[str], splits: Sequence[str]) -> Cluster:
    rows = _rows(pairs)
    present = tuple(sorted({splits[row] for row in rows}, key=SPLITS.index))
    return Cluster(rows, tuple(pairs), present, tuple(dict.fromkeys(labels[row] for row in rows)))
