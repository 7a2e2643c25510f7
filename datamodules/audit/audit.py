"""The whole audit of labelled images, and what it found."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.audit.duplicates import FLAT, Cluster, Duplicates, find_duplicates
from datamodules.audit.groups import GroupSuggestion, crossing_groups, suggest_groups
from datamodules.audit.inspection import Decode, Inspection, inspect
from datamodules.audit.labels import Judgement, judge_labels
from datamodules.audit.shortcuts import Shortcut, find_shortcut
from datamodules.audit.ties import first_of_tied
from datamodules.decode import decode as decode_rgb
from datamodules.errors import DataError
from datamodules.table import ImageTable

#: An image as it is stored, and what training would see of it: uint8 ``(H, W, 3)`` each.
Augmented = tuple[NDArray[np.uint8], Sequence[NDArray[np.uint8]]]
#: Called with what is being done (``reading`` or ``comparing``), how many are done, and of how many.
AuditProgress = Callable[[str, int, int], None]

# A picture whose lower part is missing by more than this share is reported.
_MISSING = 0.02


@dataclass(frozen=True)
class Audit:
    """What was found. Rows are those of the table.

    Attributes:
        table: the images.
        inspection: what is known of each file.
        duplicates: pictures that are there more than once.
        crossing: given groups that are in more than one split, with their images in each.
        judgement: of the labels; None where there were no features.
        suggestions: groups that the file names suggest, where none are given.
        shortcut: how the files alone tell the class; None where they do not.
        drift: how the files alone tell the split, where the data came divided.
        augmented: pictures as training would see them.
        decode: how the images were decoded.
    """

    table: ImageTable
    inspection: Inspection
    duplicates: Duplicates
    crossing: dict[str, Counter[str]]
    judgement: Judgement | None
    suggestions: list[GroupSuggestion]
    shortcut: Shortcut | None
    drift: Shortcut | None
    augmented: Sequence[Augmented] = field(default=(), repr=False)
    decode: Decode = field(default=decode_rgb, repr=False)

    @property
    def leaks(self) -> list[Cluster]:
        """Copies of a picture that are in more than one split."""
        return [cluster for cluster in self.duplicates.clusters if cluster.leaks]

    @property
    def conflicts(self) -> list[Cluster]:
        """Copies of a picture that have different labels."""
        return [cluster for cluster in self.duplicates.clusters if cluster.conflict]

    @property
    def unreadable(self) -> list[int]:
        """Images that cannot be read."""
        return self._rows_where(lambda fact: fact.problem is not None)

    @property
    def misnamed(self) -> list[int]:
        """Images whose file ending promises another format."""
        return self._rows_where(lambda fact: fact.misnamed and fact.problem is None)

    @property
    def animated(self) -> list[int]:
        """Files with several pictures, of which only the first is used."""
        return self._rows_where(lambda fact: fact.animated)

    @property
    def damaged(self) -> list[int]:
        """Images whose lower part is the flat grey of missing data."""
        return self._rows_where(lambda fact: fact.missing_rows > _MISSING)

    @property
    def flat(self) -> list[int]:
        """Readable images that show next to nothing, being of one shade."""
        shades = self.inspection.grey.std((1, 2))
        return [int(row) for row in np.flatnonzero(self.inspection.readable & (shades < FLAT))]

    @property
    def passed(self) -> bool:
        """Whether every image can be read and no picture or given group is in more than one split."""
        return not (self.unreadable or self.leaks or self.crossing)

    def groups(self) -> list[str]:
        """A group for each image under which a split keeps together what belongs together.

        Copies of a picture share one, and so do images of a given group; an image that shares with two of them joins
        them. A group is called after the path of its first image.
        """
        return _together(self.table, self.duplicates)

    def _rows_where(self, condition: Callable[[Any], bool]) -> list[int]:
        return [row for row, fact in enumerate(self.inspection.facts) if condition(fact)]


def audit(
    table: ImageTable,
    *,
    inspection: Inspection | None = None,
    features: NDArray[np.float32] | None = None,
    decode: Decode = decode_rgb,
    augmented: Sequence[Augmented] = (),
    progress: AuditProgress | None = None,
    seed: int = 0,
) -> Audit:
    """Look for what goes wrong in labelled images.

    Args:
        table: the images with labels and splits.
        inspection: where they have been inspected already (see :func:`~datamodules.audit.inspection.inspect`).
        features: of a network that was not trained on these labels, ``(N, F)``; lines that are not finite, as for
            images that cannot be read, are left out. Without features labels are not judged.
        decode: from an encoded image to pixels ``(H, W, C)``; raises OSError.
        augmented: pictures to show in the report.
        progress: called now and then.
        seed: of what is drawn (folds, pairs).

    Raises:
        DataError: there are no images, or not one line of features for each.
    """
    listing = table.listing
    if not table.paths:
        raise DataError("data: expected images to audit, found none; check data.root.")
    if features is not None and len(features) != len(table.paths):
        raise DataError(
            f"features: expected one line for each of {len(table.paths):,} images, found {len(features):,}; compute "
            "them for all images of the table."
        )
    if inspection is None:
        reading = None if progress is None else lambda done, total: progress("reading", done, total)
        inspection = inspect(listing.storage, table.paths, decode, reading)
    comparing = None if progress is None else lambda done, total: progress("comparing", done, total)
    usable = inspection.readable
    if features is not None:
        usable &= np.isfinite(features).all(1)
        features = np.where(usable[:, None], features, 0).astype(np.float32)
    labels = [", ".join(sorted(listing.classes_of(row))) for row in range(len(table.paths))]
    duplicates = find_duplicates(inspection, labels, table.splits, features, comparing)
    given = listing.groups
    single = listing.separator is None
    readable = [row for row, fact in enumerate(inspection.facts) if fact.problem is None]
    facts = [inspection.facts[row] for row in readable]
    judgement = None if features is None else _judge(table, features, usable, _together(table, duplicates), seed)
    return Audit(
        table=table,
        inspection=inspection,
        duplicates=duplicates,
        crossing={} if given is None else crossing_groups(given, table.splits),
        judgement=judgement,
        suggestions=_suggestions(table, inspection, features, seed) if given is None else [],
        shortcut=find_shortcut(facts, [table.labels[row] for row in readable], seed) if single else None,
        drift=None if table.split_is_ours else find_shortcut(facts, [table.splits[row] for row in readable], seed),
        augmented=augmented,
        decode=decode,
    )


def _judge(
    table: ImageTable, features: NDArray[np.float32], usable: NDArray[np.bool_], together: list[str], seed: int
) -> Judgement:
    rows = np.flatnonzero(usable)
    judged = judge_labels(
        [table.listing.classes_of(int(row)) for row in rows],
        features[rows],
        [together[row] for row in rows],
        multi_label=table.listing.separator is not None,
        seed=seed,
    )
    scores = np.full(len(features), np.nan)
    scores[rows] = judged.scores
    return Judgement(scores, [replace(suspect, row=int(rows[suspect.row])) for suspect in judged.suspects])


def _together(table: ImageTable, duplicates: Duplicates) -> list[str]:
    ties: list[Sequence[int]] = [cluster.rows for cluster in duplicates.clusters]
    if table.listing.groups is not None:
        rows_of: dict[str, list[int]] = {}
        for row, group in enumerate(table.listing.groups):
            if not group:
                continue  # an image on its own
            rows_of.setdefault(group, []).append(row)
        ties += rows_of.values()
    return [table.paths[row] for row in first_of_tied(len(table.paths), ties)]


def _suggestions(
    table: ImageTable, inspection: Inspection, features: NDArray[np.float32] | None, seed: int
) -> list[GroupSuggestion]:
    if features is None:
        grey = inspection.grey.reshape(len(inspection.grey), 8, 8, 8, 8).mean((2, 4)).reshape(len(inspection.grey), -1)
        chroma = inspection.chroma.reshape(len(grey), 2, 4, 4, 4, 4).mean((3, 5)).reshape(len(grey), -1)
        features = np.concatenate([grey, chroma], 1).astype(np.float32)
    return suggest_groups(table.paths, table.labels, table.splits, features, seed)
