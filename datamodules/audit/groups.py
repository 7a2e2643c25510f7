"""What file names tell of images that belong together: frames of one film, slices of one patient, tiles of one scene.

Such images are alike, and a split that separates them tests what was trained on.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.division import group_keys

# Things of which several pictures are taken, the closest kin first.
_BEINGS = (
    "patient|subject|person|participant|volunteer|donor|animal|individual|plant|tree|specimen|sample|biopsy|case|id"
)
_FILMS = "video|vid|clip|movie|film|sequence|seq|track|burst|scan|slide|study|exam|session"
_PLACES = "site|scene|place|location|station|camera|cam|plot|field|house|room|batch|lot|module|panel|wafer|board|device"
_CHANGES = "aug|augmented|flip|flipped|hflip|vflip|mirror|rot|rotated|crop|bright|dark|noise|blur|copy|edited|small"
_DATE = r"(?:19|20)\d\d[-_]?(?:0[1-9]|1[0-2])[-_]?(?:0[1-9]|[12]\d|3[01])"
_END = r"\.[^./]+$"

# What a name may be made of, the most telling first, with what its groups are. Only the last part of the path is
# looked at, except where folders are the groups.
_PATTERNS = (
    (
        rf"(?:^|/)(?P<group>[^/]+)[._](?:jpe?g|png|bmp|webp|tiff?)\.rf\.[0-9a-f]+{_END}",
        "pictures that Roboflow changed",
    ),
    (
        rf"(?i)(?:^|/)(?P<group>[^/]+?)(?:[-_. ]+(?:{_CHANGES})[-_ ]?\d*| ?\(\d+\)| - copy)*{_END}",
        "a picture and its changed copies",
    ),
    (rf"(?i)(?:^|[^a-z])(?P<group>(?:{_BEINGS})[-_ ]?\d+)(?!\d)", "a numbered being or specimen that the path names"),
    (rf"(?i)(?:^|[^a-z])(?P<group>(?:{_FILMS})[-_ ]?\d+)(?!\d)", "a numbered film or session that the path names"),
    (rf"(?i)(?:^|[^a-z])(?P<group>(?:{_PLACES})[-_ ]?\d+)(?!\d)", "a numbered place or batch that the path names"),
    (rf"(?:^|/)(?P<group>[^/]*?[^/_ -])[-_ ]?[xrXR]\d+[-_ ]?[ycYC]\d+{_END}", "tiles of one scene"),
    (rf"(?:^|/)(?P<group>[^/]*?[^/_ -])[-_ ]\d+[-_ ]\d+{_END}", "what comes before two numbers at the end"),
    (rf"(?:^|/)(?P<group>[^/]*?[^/_ -])[-_ ]+[A-Za-z]*\d+{_END}", "what comes before the last number"),
    (rf"(?:^|/)(?P<group>[^/.]*\d)[A-Za-z]{_END}", "what comes before a letter at the end"),
    (rf"(?:^|/)(?P<group>[A-Za-z]+\d+)[A-Za-z]+\d+{_END}", "the first of two numbers"),
    (r"(?:^|/)(?P<group>[^-_ /.]+)[-_ ][^/]*$", "the first word of the name"),
    (r"(?:^|/)(?P<group>[^-_ /.]+[-_ ][^-_ /.]+)[-_ ][^/]*$", "the first two words of the name"),
    (r"(?:^|/)(?P<group>[^-_ /.]+(?:[-_ ][^-_ /.]+){2})[-_ ][^/]*$", "the first three words of the name"),
    (rf"(?<!\d)(?P<group>{_DATE})(?!\d\d\d$)", "the day"),
    (r"(?:^|/)(?P<group>[^/]+)/[^/]+$", "the folder"),
    (r"(?:^|/)(?P<group>[^/]+)/[^/]+/[^/]+$", "the folder above the folder"),
)

#: What a suggestion must show, at least or at most.
_FEWEST_GROUPS = 4
_LEAST_TOGETHER = 0.3  # share of the images that are not alone in their group
_LARGEST_GROUP = 0.5  # share of the images
_LEAST_REPEATED = 0.2  # share of the groups that have two images in one folder
_LEAST_ALIKE = 0.55
_PAIRS = 2000  # compared to say how alike the images of a group are
_MOST = 5


@dataclass(frozen=True)
class GroupSuggestion:
    """A way to read groups off the paths.

    Attributes:
        pattern: a regular expression for :func:`re.search` on a path, with a named group ``group``.
        meaning: what a group is, in words.
        example: a path, and the group that is read off it.
        groups: how many there are.
        smallest: images in the smallest.
        largest: images in the largest.
        together: images that are not alone in their group.
        crossing: groups that are in more than one split.
        alike: probability that two images of a class are more alike if they are of one group than if they are not;
            None where there was nothing to compare. 0.5: groups mean nothing to the eye.
    """

    pattern: str
    meaning: str
    example: tuple[str, str]
    groups: int
    smallest: int
    largest: int
    together: int
    crossing: int
    alike: float | None


def suggest_groups(
    paths: Sequence[str],
    labels: Sequence[str],
    splits: Sequence[str],
    likeness: NDArray[np.float32] | None = None,
    seed: int = 0,
) -> list[GroupSuggestion]:
    """Ways to read groups off the paths, the most telling first; none where names only count.

    What is suggested has at least four groups, of two images or more for 30 % of the images, none with more than half
    of them; the groups are not the classes, and are more than equal numbers in different folders. Where likenesses are
    given, images of one group must be more alike than others of their class.

    Args:
        paths: of the images.
        labels: of each image.
        splits: of each image.
        likeness: what is compared by Euclidean distance, ``(N, F)``.
        seed: of the choice of pairs that are compared.
    """
    suggestions = []
    known: set[bytes] = set()
    classes = np.unique(labels, return_inverse=True)[1]
    folders = np.unique([path.rpartition("/")[0] for path in paths], return_inverse=True)[1]
    for pattern, meaning in _PATTERNS:
        keys = group_keys(paths, pattern)
        codes = np.unique(keys, return_inverse=True)[1]
        first_seen = np.unique(codes, return_index=True)[1]
        canonical = np.argsort(np.argsort(first_seen))[codes].tobytes()
        if canonical in known or not _means_something(codes, classes, folders):
            continue
        known.add(canonical)
        alike = None if likeness is None else _alike(codes, labels, likeness, seed)
        if alike is None or alike >= _LEAST_ALIKE:
            suggestions.append(_describe(pattern, meaning, paths, keys, splits, alike))
    if likeness is not None:
        suggestions.sort(key=lambda suggestion: -(suggestion.alike or 0.5))
    return suggestions[:_MOST]


def crossing_groups(groups: Sequence[str], splits: Sequence[str]) -> dict[str, Counter[str]]:
    """Groups that are in more than one split, with their images in each, the largest first."""
    found: dict[str, Counter[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        if group:  # an image without one is on its own
            found.setdefault(group, Counter())[split] += 1
    crossing = [(group, counts) for group, counts in found.items() if len(counts) > 1]
    return dict(sorted(crossing, key=lambda item: -item[1].total()))


def _means_something(codes: NDArray[np.int64], classes: NDArray[np.int64], folders: NDArray[np.int64]) -> bool:
    sizes = np.bincount(codes)
    if len(sizes) < _FEWEST_GROUPS or sizes.max() > _LARGEST_GROUP * len(codes):
        return False
    if (sizes[codes] > 1).mean() < _LEAST_TOGETHER:
        return False
    in_classes = len(np.unique(np.stack([codes, classes], 1), axis=0))
    if in_classes == len(sizes) and len(sizes) <= 2 * (classes.max() + 1):
        return False  # each group lies in one class, and there are hardly more groups than classes: names of classes
    # Numbers that each folder counts by itself would make groups with one image of every folder.
    parts, images = np.unique(np.stack([codes, folders], 1), axis=0, return_counts=True)
    return len(np.unique(parts[images > 1][:, 0])) >= _LEAST_REPEATED * (sizes > 1).sum()


def _alike(codes: NDArray[np.int64], labels: Sequence[str], likeness: NDArray[np.float32], seed: int) -> float | None:
    """Of pairs within a group and pairs across groups, both within a class: how often the first is closer."""
    rng = np.random.default_rng(seed)
    classes = np.unique(labels, return_inverse=True)[1]
    order = np.lexsort((rng.random(len(codes)), codes, classes))
    neighbours = np.stack([order[:-1], order[1:]], 1)
    same = (codes[neighbours[:, 0]] == codes[neighbours[:, 1]]) & (
        classes[neighbours[:, 0]] == classes[neighbours[:, 1]]
    )
    inside = rng.permutation(neighbours[same])[:_PAIRS]
    across = []
    for one, _ in inside:
        others = np.flatnonzero((classes == classes[one]) & (codes != codes[one]))
        if len(others):
            across.append((one, rng.choice(others)))
    if not len(inside) or not across:
        return None
    near, far = (
        np.linalg.norm(likeness[pairs[:, 0]] - likeness[pairs[:, 1]], axis=1) for pairs in (inside, np.array(across))
    )
    rank = np.searchsorted(np.sort(far), near, side="left") + np.searchsorted(np.sort(far), near, side="right")
    return float(1 - rank.mean() / 2 / len(far))


def _describe(
    pattern: str, meaning: str, paths: Sequence[str], keys: list[str], splits: Sequence[str], alike: float | None
) -> GroupSuggestion:
    sizes = Counter(keys)
    example = next(row for row, key in enumerate(keys) if sizes[key] > 1)
    return GroupSuggestion(
        pattern=pattern,
        meaning=meaning,
        example=(paths[example], keys[example]),
        groups=len(sizes),
        smallest=min(sizes.values()),
        largest=max(sizes.values()),
        together=sum(size for size in sizes.values() if size > 1),
        crossing=len(crossing_groups(keys, splits)),
        alike=None if alike is None else round(alike, 3),
    )
