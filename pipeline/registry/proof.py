"""Proving that a registered model answers as its test did, where nothing of the training can be imported."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.predictions import Predictions
from pipeline.registry.tested import Tested

#: How far a probability of the registered model may be from the tested one's.
TOLERANCE = 1e-4
_BLOCKED = (
    "torch", "lightning", "pytorch_lightning", "lightning_fabric", "timm", "torchvision", "torchmetrics",
    "albumentations", "cv2", "simplejpeg", "onnx", "onnxscript", "pipeline", "datamodules",
)  # fmt: skip
_LAST_LINES = 3  # of what the process says when it fails


def require_agreement(found: NDArray[Any], tested: NDArray[Any], multi_label: bool, who: str) -> None:
    """Compare probabilities ``(N, classes)`` with those of the test, to 1e-4 each and to the label.

    Args:
        found: what the model answered.
        tested: what the test saw.
        multi_label: whether an image may have several classes.
        who: gave the answers, in words.

    Raises:
        RuntimeError: they differ.
    """
    if found.shape != tested.shape:
        raise RuntimeError(f"{who} disagrees with the test: expected answers {tested.shape}, found {found.shape}.")
    difference = float(np.abs(found - tested).max(initial=0))
    labels = [Predictions(np.full(len(p), -1), p, multi_label).labels for p in (found, tested)]
    others = int((labels[0] != labels[1]).reshape(len(found), -1).any(axis=1).sum())
    # Written so that an answer that is no number fails, too.
    if others or not difference <= TOLERANCE:
        raise RuntimeError(
            f"{who} disagrees with the test by up to {difference:.2g} in probability (allowed: {TOLERANCE:g}), and on "
            f"{others} of {len(found)} labels."
        )


def require_familiarity(found: NDArray[Any], tested: Predictions, step: float | None, who: str) -> None:
    """Compare how familiar images were found with what the test found, ``(N,)``, to one step.

    Args:
        found: what the model said.
        tested: what the test saw.
        step: the least difference between two values; None: nothing was measured.
        who: gave the answers, in words.

    Raises:
        RuntimeError: they differ.
    """
    expected = np.empty(0) if tested.familiarity is None or step is None else tested.familiarity
    difference = float(np.abs(found - expected).max(initial=0)) if found.shape == expected.shape else np.inf
    # A distance that is rounded otherwise may pass one of the held-out images, and no more.
    if not difference <= (step or 0.0) + TOLERANCE:
        raise RuntimeError(f"{who} disagrees with the test by {difference:.2g} in how familiar images are.")


def keep_images(folder: Path, read: Callable[[int], bytes], count: int) -> list[str]:
    """Write encoded images into a file that another process can read.

    Args:
        folder: for ``images.bin`` and ``ends.npy`` (see :mod:`pipeline.registry.replay`).
        read: gives the bytes of one.
        count: of images.

    Returns:
        SHA-256 of each, in hexadecimal.
    """
    contents, ends = [], []
    with (folder / "images.bin").open("wb") as file:
        for index in range(count):
            image = read(index)
            file.write(image)
            ends.append(file.tell())
            contents.append(hashlib.sha256(image).hexdigest())
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    return contents


class Prover:
    """Has a registered model repeat its golden samples and its whole test in a fresh process.

    The process starts in another folder, cannot import what training needs, and may not unpickle models. It starts when
    the block is entered, and is ready about when the model is: its imports take as long as an export.

    Args:
        tracking_uri: of the registry.
        folder: where the images will be (see :func:`keep_images`), in the order of the test.
    """

    def __init__(self, tracking_uri: str, folder: Path) -> None:
        self.tracking_uri, self.folder = tracking_uri, folder

    def __enter__(self) -> "Prover":
        environment = {
            **os.environ,
            "BLOCKED": ",".join(_BLOCKED),
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_REGISTRY_URI": self.tracking_uri,
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        }
        # -P: the folder of the script, which holds modules of ours, is not where imports look.
        command = [sys.executable, "-P", str(Path(__file__).with_name("replay.py")), str(self.folder)]
        self._process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    def prove(self, address: str, tested: Tested, threshold: float | None, step: float | None = None) -> None:
        """Load a model, ask it, and compare; once.

        Args:
            address: ``models:/<name>/<version>``.
            tested: what it must repeat.
            threshold: score below which it gives no label.
            step: the least difference in how familiar images are; None: it says nothing of that.

        Raises:
            RuntimeError: it cannot be loaded there, or answers otherwise; the message says which.
        """
        _, said = self._process.communicate(f"{address}\n")
        if self._process.returncode != 0:
            last = " / ".join(line.strip() for line in said.strip().splitlines()[-_LAST_LINES:])
            raise RuntimeError(f"{address} cannot answer in a process without the training packages: {last}")
        answers = np.load(self.folder / "answers.npz", allow_pickle=False)
        predictions = tested.predictions
        several = predictions.multi_label
        require_agreement(answers["golden"], answers["expected"], several, f"{address}, golden samples,")
        require_agreement(answers["probabilities"], predictions.probabilities, several, address)
        require_familiarity(answers["familiarity"], predictions, step, address)
        labels = json.loads((self.folder / "labels.json").read_text(encoding="utf-8"))
        if labels != _labels(answers["probabilities"], tested, threshold):
            raise RuntimeError(f"{address} gives other labels than follow from its probabilities.")


def _labels(probabilities: NDArray[np.float64], tested: Tested, threshold: float | None) -> list[Any]:
    answered = Predictions(tested.predictions.targets, probabilities, tested.predictions.multi_label)
    if answered.multi_label:
        return [[tested.classes[i] for i in row.nonzero()[0]] for row in answered.labels]
    least = -1.0 if threshold is None else threshold
    return [
        tested.classes[label] if score >= least else ""
        for label, score in zip(answered.labels, answered.scores, strict=True)
    ]
