"""From encoded images to answers with ONNX Runtime: what a registered model does, without MLflow.

Needs numpy, Pillow and onnxruntime alone, because a registered model carries a copy of this file.
"""

import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BATCH = 32


def load_private(path: Path) -> ModuleType:
    """A Python file as a module under a name that no other code can claim.

    Two versions of a model in one process keep so each their own code.
    """
    name = f"_bundled_{path.stem}_{uuid.uuid4().hex}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: by its affinity, by what its container is allowed, and by ``OMP_NUM_THREADS``.

    Ray and Spark set that variable for each of the processes that share a machine.

    Args:
        quota: microseconds of processor time allowed, and in how many, as Linux tells a container.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = os.environ.get("OMP_NUM_THREADS", "")
    if share.isdecimal():  # it may be empty, or a list for nested loops
        cores = min(cores, max(1, int(share)))
    try:
        allowed, period = quota.read_text(encoding="ascii").split()
        return min(cores, max(1, round(int(allowed) / int(period))))
    except (OSError, ValueError):  # no such container, or "max": as much as there is
        return cores


#: Where a bundle keeps its samples: the encoded images in order of their names, and what was answered for them.
GOLDEN, GOLDEN_ANSWERS = "golden", "golden.json"


class Answers(NamedTuple):
    """What is said of images.

    Attributes:
        probabilities: float32 ``(N, number of classes)``.
        familiarity: float32 ``(N,)``, how usual an image is among those trained on: the share of held-out images that
            are no less strange. None where that was not measured.
    """

    probabilities: NDArray[np.float32]
    familiarity: NDArray[np.float32] | None


class Bundle:
    """A folder with ``model.onnx``, ``bundle.json``, ``decode.py`` and ``preprocessing.py``.

    Args:
        folder: of the bundle.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        content = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        #: The label space in order.
        self.classes: list[str] = content["classes"]
        #: Whether an image may have several classes.
        self.multi_label: bool = content["multi_label"]
        #: Score below which no label is given; None: one always is.
        self.threshold: float | None = content["threshold"]
        #: Whether it says how familiar an image is.
        self.knows_familiarity: bool = content["familiarity"] is not None
        self._folder = folder
        self._open = load_private(folder / "decode.py").EncodedImage
        self._preprocessing = load_private(folder / "preprocessing.py").Preprocessing.from_dict(
            content["preprocessing"]
        )
        options = onnxruntime.SessionOptions()
        # By itself it takes one for each core of the machine; more than may run at once wait for each other, and an
        # answer takes twice as long.
        options.intra_op_num_threads = usable_cores()
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def predict(self, images: Sequence[bytes]) -> Answers:
        """Answers to encoded images.

        Raises:
            ValueError: an image cannot be read; the message names its row.
        """
        return self._run(self._pixels(image, f"row {row}: ") for row, image in enumerate(images))

    def predict_each(self, images: Iterable[bytes]) -> tuple[Answers, list[str | None]]:
        """Answers to the images that can be read, in order, and for each image why it cannot be; None: it can."""
        reasons: list[str | None] = []

        def readable() -> Iterator[NDArray[Any]]:
            for image in images:
                try:
                    pixels = self._pixels(image)
                except ValueError as error:
                    reasons.append(str(error))
                else:
                    reasons.append(None)
                    yield pixels

        return self._run(readable()), reasons

    def predict_arrays(self, images: NDArray[Any]) -> Answers:
        """Answers to decoded images of any one size.

        Args:
            images: ``(N, H, W, C)`` with the channels and of the type that the model was trained on, most often RGB of
                uint8; not resized, not normalised.

        Raises:
            ValueError: the shape or the type is another.
        """
        record = self._preprocessing
        fits = images.ndim == 4 and images.shape[3] == record.channels and min(images.shape[1:]) > 0
        if not fits or images.dtype.name != record.dtype:
            raise ValueError(
                f"expected images (N, H, W, {record.channels}) of {record.dtype}, found {images.shape} of "
                f"{images.dtype.name}; encoded images go to predict"
            )
        return self._run(record.fit_to_size(image).transpose(2, 0, 1) for image in images)

    def golden_samples(self) -> tuple[list[bytes], NDArray[np.float64]]:
        """Encoded images that came with the model, and the probabilities ``(N, classes)`` expected of them."""
        images = [path.read_bytes() for path in sorted((self._folder / GOLDEN).iterdir())]
        return images, np.array(json.loads((self._folder / GOLDEN_ANSWERS).read_text(encoding="utf-8")))

    def _run(self, prepared: Iterable[NDArray[Any]]) -> Answers:
        names = ["probabilities", *(["familiarity"] if self.knows_familiarity else [])]
        said: list[list[NDArray[np.float32]]] = [
            [np.empty((0, len(self.classes)), np.float32), np.empty(0, np.float32)]
        ]
        waiting = iter(prepared)
        while batch := list(islice(waiting, _BATCH)):
            said.append(self._session.run(names, {"image": np.stack(batch)}))
        probabilities = np.concatenate([part[0] for part in said])
        return Answers(probabilities, np.concatenate([part[1] for part in said]) if self.knows_familiarity else None)

    def _pixels(self, image: bytes, where: str = "") -> NDArray[Any]:
        expected = f"{where}expected the bytes of an encoded image, found"
        if not isinstance(image, bytes | bytearray | memoryview):
            raise ValueError(f"{expected} {type(image).__name__}; read the file and pass its content")
        try:
            picture = self._open(bytes(image), self._preprocessing.channels, self._preprocessing.dtype)
            return self._preprocessing.prepare(picture).transpose(2, 0, 1)
        except OSError as error:
            raise ValueError(f"{expected} {len(image)} bytes that cannot be read as one: {error}") from error
