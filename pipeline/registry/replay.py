"""Ask a registered model for its answers in a process that has nothing of the training: run as a script.

``python -P replay.py <folder>``, with what may not be imported, separated by commas, in the environment's ``BLOCKED``.
The ``models:/`` address comes through standard input, a line, once there is one. By then the folder has ``images.bin``,
encoded images one after the other, and ``ends.npy``, where each ends; ``answers.npz`` is written into it. Needs MLflow
and what the model needs.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_CHUNK = 64  # images that are in memory at once


class _Blocker(MetaPathFinder):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named '{fullname}' where the model is to answer", name=fullname)
        return None


def _chunks(folder: Path) -> Iterator[list[bytes]]:
    ends = np.load(folder / "ends.npy", allow_pickle=False)
    with (folder / "images.bin").open("rb") as file:
        lengths = np.diff(ends, prepend=0)
        for start in range(0, len(lengths), _CHUNK):
            yield [file.read(int(length)) for length in lengths[start : start + _CHUNK]]


def _answer(model: Any, chunks: Iterator[list[bytes]]) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Probabilities ``(N, classes)``, familiarity ``(N,)`` or ``(0,)``, and of each image its label, or its labels."""
    import pandas as pd

    probabilities, familiarity, labels = [], [], []
    for images in chunks:
        answer = model.predict(pd.DataFrame({"image": images}))
        probabilities += list(answer["probabilities"])
        familiarity += list(answer.get("familiarity", ()))
        labels += list(answer["labels"] if "labels" in answer else answer["label"])
    return np.array(probabilities), np.array(familiarity), labels


def main(folder: Path) -> None:
    """Write the answers to the images of the folder, and to the golden samples that the model came with."""
    sys.meta_path.insert(0, _Blocker(os.environ["BLOCKED"].split(",")))
    import mlflow.pyfunc
    import onnxruntime  # noqa: F401 -- the model's, which takes a while
    import pandas  # noqa: F401 -- as well

    address = sys.stdin.readline().strip()
    if not address:
        return  # nobody asks any more
    model = mlflow.pyfunc.load_model(address)
    images, expected = model.unwrap_python_model().bundle.golden_samples()
    golden, _, _ = _answer(model, iter([images]))
    probabilities, familiarity, labels = _answer(model, _chunks(folder))
    answers = {"golden": golden, "expected": expected, "probabilities": probabilities, "familiarity": familiarity}
    np.savez(folder / "answers.npz", **answers)
    (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
