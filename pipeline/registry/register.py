"""From a trained model to a version in the MLflow model registry."""

import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.predictions import Predictions
from pipeline.registry.bundle import needs_tifffile, write_bundle
from pipeline.registry.inference import Bundle
from pipeline.task import ClassificationTask
from pipeline.tracking.logger import MLflowLogger
from pipeline.tracking.store import is_away, pointing_mlflow_at

CHALLENGER = "challenger"
#: How far a probability of the registered model may be from the tested one's.
TOLERANCE = 1e-4
_GOLDEN_SAMPLES = 16
_PATIENCE = 30.0  # seconds that a server which is away has to come back
_REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "onnxruntime")


class StoreAwayError(Exception):
    """The tracking store, which holds the registry, does not answer."""


def register(
    name: str,
    task: ClassificationTask,
    logger: MLflowLogger,
    read: Callable[[int], bytes],
    tested: Predictions,
    description: dict[str, Any],
) -> str:
    """Log the model in its run and register it under the alias ``challenger``.

    Before that the bundle must give what ``test`` saw, to 1e-4 in each probability and to the label, for images
    spread over the test split.

    Args:
        name: of the registered model.
        task: the trained model.
        logger: of the run that the version will belong to.
        read: gives the encoded bytes of an image of the test split.
        tested: their predictions.
        description: plain types for the bundle (see :func:`~pipeline.registry.bundle.write_bundle`).

    Returns:
        The version.

    Raises:
        RuntimeError: the bundle disagrees with ``test``; nothing is registered.
        StoreAwayError: the run has not arrived in the store, or the store left before the model was there.
    """
    import mlflow
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    outputs = [
        ColSpec(DataType.string, "label"),
        ColSpec(DataType.long, "label_id"),
        ColSpec(DataType.double, "score"),
    ]
    if tested.multi_label:
        outputs = [ColSpec(Array(DataType.string), "labels")]
    outputs.append(ColSpec(Array(DataType.double), "probabilities"))
    needs = [*_REQUIREMENTS, *(["tifffile", "imagecodecs"] if needs_tifffile(task.hparams["preprocessing"]) else [])]
    chosen = np.unique(np.linspace(0, len(tested.probabilities) - 1, _GOLDEN_SAMPLES).astype(int))
    encoded = [read(int(i)) for i in chosen]
    if not logger.settle(_PATIENCE):  # the version will belong to the run, which must be there
        raise StoreAwayError(f"the tracking server does not take the run ({logger.failure or 'no answer'})")
    client = logger.experiment
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        write_bundle(folder, task, description)
        _require_agreement(Bundle(folder).predict(encoded), tested.probabilities[chosen], tested.multi_label)
        try:
            with pointing_mlflow_at(logger.tracking_uri), mlflow.start_run(run_id=logger.run_id):
                logged = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(Path(__file__).with_name("served.py")),
                    artifacts={"bundle": str(folder)},
                    signature=ModelSignature(
                        inputs=Schema([ColSpec(DataType.binary, "image")]),
                        outputs=Schema(outputs),
                    ),
                    input_example=pd.DataFrame({"image": encoded[:1]}),
                    pip_requirements=[f"{package}=={version(package)}" for package in needs],
                    registered_model_name=name,
                )
                number = str(logged.registered_model_version)
                client.set_registered_model_alias(name, CHALLENGER, number)
        except Exception as error:
            if is_away(error, logger.tracking_uri):
                raise StoreAwayError(f"the tracking server left before it was done ({error})") from error
            raise
    return number


def _require_agreement(served: np.ndarray, tested: np.ndarray, multi_label: bool) -> None:
    difference = float(np.abs(served - tested).max())
    answers = [Predictions(np.full(len(p), -1), p, multi_label).labels for p in (served, tested)]
    if difference > TOLERANCE or (answers[0] != answers[1]).any():
        raise RuntimeError(
            f"The exported model disagrees with the tested one by up to {difference:.2g} in probability "
            f"(allowed: {TOLERANCE:g}) on {len(served)} test images; nothing was registered."
        )
