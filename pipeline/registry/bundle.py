"""The folder that is registered: an ONNX graph, what it must be fed, and the code that feeds it."""

import contextlib
import io
import json
import logging
import platform
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import datamodules.decode
import datamodules.preprocessing
import pipeline.registry.inference
from datamodules.preprocessing import Preprocessing
from pipeline.models.files import Facts, save_weights
from pipeline.registry.inference import GOLDEN, GOLDEN_ANSWERS
from pipeline.task import FAMILIARITY, ClassificationTask

#: The bundle's name among the artifacts of a registered model, and its file that says what is in it.
BUNDLE, DESCRIPTION = "bundle", "bundle.json"
#: The file that fine-tuning starts from.
WEIGHTS = "model.safetensors"
_MADE_WITH = ("torch", "lightning", "onnx", "onnxscript", "onnxruntime", "mlflow", "numpy", "pillow")


class _Answers(nn.Module):
    """Images ``(N, C, size, size)`` of the record's dtype to what is said of them, in order: what is exported."""

    def __init__(self, task: ClassificationTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(said for said in self.task.answer(image) if said is not None)


def write_bundle(
    folder: Path, task: ClassificationTask, description: dict[str, Any], threshold: float | None = None
) -> None:
    """Fill an empty folder with ``model.onnx`` (any batch size), ``bundle.json`` and the code that feeds it.

    Scaling and normalising are inside the graph, so that whoever feeds it cannot get them wrong. ``model.safetensors``
    holds the same weights, to be trained further.

    Args:
        folder: exists and is empty.
        task: the trained model.
        description: plain types kept in ``bundle.json`` beside what the model itself knows.
        threshold: score below which the served model gives no label; None: it always gives one.
    """
    task = task.cpu().eval()
    record = Preprocessing.from_dict(task.hparams["preprocessing"])
    example = torch.zeros(2, record.channels, record.size, record.size, dtype=getattr(torch, record.dtype))
    with _quiet_exporter():
        torch.onnx.export(
            _Answers(task),
            (example,),
            str(folder / "model.onnx"),
            input_names=["image"],
            output_names=["probabilities", *([] if task.familiarity is None else [FAMILIARITY])],
            dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1)}},
            external_data=False,
            dynamo=True,
        )
    content = {
        "classes": task.classes,
        "multi_label": task.hparams["multi_label"],
        "preprocessing": record.to_dict(),
        "calibration": {"method": "temperature", "temperature": float(task.temperature)},
        "threshold": threshold,
        # The least difference between two values: rounding may move one by so much.
        "familiarity": None if task.familiarity is None else {"step": task.familiarity.step},
        "backbone": task.hparams["backbone"],
        "head_stages": task.hparams["head_stages"],
        "test_time_augmentation": task.hparams["test_time_augmentation"],
        "weights": asdict(task.lineage),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _MADE_WITH}},
        **description,
    }
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    lineage = task.lineage
    facts = Facts(task.hparams["backbone"], record.to_dict(), lineage.licence, lineage.origin)
    save_weights(folder / WEIGHTS, task.network.state_dict(), facts)
    for module in (pipeline.registry.inference, datamodules.decode, datamodules.preprocessing):
        shutil.copy(str(module.__file__), folder)


def write_golden_samples(folder: Path, images: Sequence[bytes], expected: NDArray[np.float64]) -> None:
    """Put encoded images into a bundle with the probabilities ``(N, number of classes)`` that the test gave them."""
    (folder / GOLDEN).mkdir()
    for number, image in enumerate(images):
        (folder / GOLDEN / f"{number:02}").write_bytes(image)
    (folder / GOLDEN_ANSWERS).write_text(json.dumps(expected.tolist()), encoding="utf-8")


def needs_tifffile(record: dict[str, Any]) -> bool:
    """Whether images of a preprocessing record may be TIFF files that Pillow cannot read."""
    return record.get("dtype", "uint8") != "uint8" or record["channels"] not in (1, 3)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    # The exporter tells its own story on standard output and through warnings about its internals; failures raise.
    noisy = logging.getLogger("onnxscript")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)
