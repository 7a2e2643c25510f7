"""Predictions as a folder of Parquet files, each of which is there whole or not at all."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.evaluation.predictions import Predictions
from pipeline.runs import write_json
from pipeline.scoring.answers import answer_schema

_ABOUT = "_scoring.json"  # which readers of Parquet folders pass over
_DIGEST, _CLASSES = b"images_sha256", b"classes"


@dataclass(frozen=True)
class Part:
    """Some images in a row, and what is known of them.

    Attributes:
        number: of the part, from 0.
        root: where the paths begin.
        paths: of its images.
    """

    number: int
    root: Path
    paths: Sequence[str]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of each image's path, size and time of change."""
        sha = hashlib.sha256()
        for path in self.paths:
            try:
                found = os.stat(self.root / path)
                known = f"{found.st_size} {found.st_mtime_ns}"
            except (OSError, ValueError):  # it cannot be read, which its row will say
                known = ""
            sha.update(f"{path}\0{known}\n".encode())
        return sha.hexdigest()


class PartFolder:
    """A folder of parts, which a second run of the same scoring goes on to fill.

    A part has a row an image: ``path``, and the columns of :func:`~pipeline.scoring.answers.answer_schema`; its
    metadata names the classes in order.

    Args:
        folder: made where it is missing.
        about: what makes one scoring another than the next, in plain types.

    Raises:
        UserError: the folder has something else in it.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        note = folder / _ABOUT
        if note.is_file():
            found = json.loads(note.read_text(encoding="utf-8"))
            others = [name for name in about if found.get(name) != about[name]]
            if others:
                before = ", ".join(f"{name} {found.get(name)}" for name in others)
                raise UserError(
                    f"--output: expected a new folder, or that of the same scoring to go on with, found '{folder}', "
                    f"which was begun with another {' and '.join(others)} ({before}); name another folder."
                )
        elif folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {f"{_ABOUT}.part"}):
            raise UserError(f"--output: expected a new folder, found that '{folder}' holds something else; name one.")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(note, about)

    def has(self, part: Part) -> bool:
        """Whether a part is done.

        Raises:
            UserError: it is, but of other images.
        """
        file = self._file(part)
        if not file.is_file():
            return False
        if (pq.read_schema(file).metadata or {}).get(_DIGEST) != part.digest.encode():
            raise UserError(
                f"--output: expected the images that '{self.folder}' was begun with, found others in part "
                f"{part.number}: images were added, removed or changed since; name another folder."
            )
        return True

    def write(self, part: Part, predictions: Predictions, errors: dict[int, str], classes: Sequence[str]) -> None:
        """Keep a part.

        Args:
            part: whose images were asked for.
            predictions: of them, in the same order.
            errors: why an image could not be read, by its place.
            classes: the label space in order.
        """
        read = np.array([place not in errors for place in range(len(part.paths))])
        answers: dict[str, Any] = {"probabilities": predictions.probabilities.tolist()}
        if predictions.multi_label:
            answers["labels"] = [[classes[i] for i in row.nonzero()[0]] for row in predictions.labels]
        else:
            answers["label"] = [classes[i] for i in predictions.labels]
            answers |= {"label_id": predictions.labels, "score": predictions.scores}
        if predictions.familiarity is not None:
            answers["familiarity"] = predictions.familiarity
        columns = {"path": pa.array(part.paths, pa.string())}
        for field in answer_schema(predictions.multi_label):
            if field.name in answers:
                columns[field.name] = pa.array(answers[field.name], field.type, mask=~read)
            else:
                columns[field.name] = pa.nulls(len(part.paths), field.type)
        columns["error"] = pa.array([errors.get(place) for place in range(len(part.paths))], pa.string())
        about = {_DIGEST: part.digest, _CLASSES: json.dumps(list(classes), ensure_ascii=False)}
        unfinished = self.folder / f".{self._file(part).name}"
        pq.write_table(pa.table(columns).replace_schema_metadata(about), unfinished)
        unfinished.replace(self._file(part))

    def _file(self, part: Part) -> Path:
        return self.folder / f"part-{part.number:06}.parquet"
