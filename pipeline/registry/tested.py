"""The test split as a registered version carries it: which images, what they are, and what the model answered."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.predictions import SEPARATOR, Predictions

#: Its file in the bundle.
TESTED = "test.csv"
# Before the names of columns that come with the data, which may be called anything.
_PROBABILITY, _METADATA = "p_", "m_"
# Columns with more values name single images or people, and divide nothing into parts worth a number.
_MOST_PARTS = 20


@dataclass(frozen=True)
class Tested:
    """What a model answered in its test.

    Attributes:
        classes: the label space in order.
        paths: what each image is called.
        contents: SHA-256 of each encoded image, in hexadecimal.
        predictions: of the images, in the same order.
        groups: what each image belongs to; None where nothing is known of it.
        metadata: what else is known of each image, by name.
    """

    classes: list[str]
    paths: list[str]
    contents: list[str]
    predictions: Predictions
    groups: list[str] | None
    metadata: dict[str, list[str]]

    @cached_property
    def truths(self) -> list[str]:
        """The class of each image, or its classes joined by a bar."""
        if not self.predictions.multi_label:
            return [self.classes[target] for target in self.predictions.targets]
        return [SEPARATOR.join(self.classes[i] for i in row.nonzero()[0]) for row in self.predictions.targets]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of name, content, group and truth of every image: models with the same one had the same test."""
        sha = hashlib.sha256()
        groups = self.groups or [""] * len(self.paths)
        for row in zip(self.paths, self.contents, groups, self.truths, strict=True):
            sha.update(("\0".join(row) + "\n").encode())
        return sha.hexdigest()

    def write(self, file: Path) -> None:
        """As CSV: ``path``, ``sha256``, ``group``, ``target``, ``p_<class>`` of each class, ``m_<name>``."""
        kept = {name: values for name, values in self.metadata.items() if len(set(values)) <= _MOST_PARTS}
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            named = [f"{_PROBABILITY}{name}" for name in self.classes] + [f"{_METADATA}{name}" for name in kept]
            writer.writerow(["path", "sha256", *(["group"] if self.groups else []), "target", *named])
            for row, path in enumerate(self.paths):
                group = [self.groups[row]] if self.groups else []
                probabilities = [f"{p:.8g}" for p in self.predictions.probabilities[row]]
                others = [values[row] for values in kept.values()]
                writer.writerow([path, self.contents[row], *group, self.truths[row], *probabilities, *others])

    @classmethod
    def read(cls, file: Path, classes: Sequence[str], multi_label: bool) -> "Tested":
        """What :meth:`write` has written."""
        with file.open(newline="", encoding="utf-8") as opened:
            header, *rows = csv.reader(opened)
        columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
        probabilities = np.array([columns[f"{_PROBABILITY}{name}"] for name in classes], np.float64).T
        return cls(
            list(classes),
            columns["path"],
            columns["sha256"],
            Predictions(_targets(columns["target"], classes, multi_label), probabilities, multi_label),
            columns.get("group"),
            {name.removeprefix(_METADATA): columns[name] for name in header if name.startswith(_METADATA)},
        )


def _targets(truths: Sequence[str], classes: Sequence[str], multi_label: bool) -> NDArray[np.int64]:
    number = {name: index for index, name in enumerate(classes)}
    if not multi_label:
        return np.array([number[truth] for truth in truths], np.int64)
    targets = np.zeros((len(truths), len(classes)), np.int64)
    for row, truth in enumerate(truths):
        targets[row, [number[name] for name in truth.split(SEPARATOR) if name]] = 1
    return targets
