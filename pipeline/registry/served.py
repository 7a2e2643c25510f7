"""The registered model as MLflow runs it: encoded images in, labels out.

MLflow executes a copy of this file where nothing of this project is installed. What it needs of the project lies
beside the network in the bundle, and is loaded from there.
"""

from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import pandas as pd

_PRESENT = 0.5


class ImageClassifier(mlflow.pyfunc.PythonModel):
    """Answers a data frame with a binary column ``image`` by ``label``, ``label_id``, ``score``, ``probabilities``.

    Where an image may have several classes: by ``labels``, those with a probability of at least one half, and
    ``probabilities``.
    """

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["bundle"])
        loader = SourceFileLoader("_bundled_inference", str(folder / "inference.py"))
        inference = ModuleType(loader.name)
        loader.exec_module(inference)
        self.bundle = inference.Bundle(folder)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        probabilities = self.bundle.predict(list(model_input["image"]))
        classes = self.bundle.classes
        if self.bundle.multi_label:
            labels = [[classes[i] for i in (row >= _PRESENT).nonzero()[0]] for row in probabilities]
            return pd.DataFrame({"labels": labels, "probabilities": probabilities.astype("float64").tolist()})
        best = probabilities.argmax(axis=1)
        return pd.DataFrame(
            {
                "label": [classes[i] for i in best],
                "label_id": best.astype("int64"),
                "score": probabilities.max(axis=1).astype("float64"),
                "probabilities": probabilities.astype("float64").tolist(),
            }
        )


mlflow.models.set_model(ImageClassifier())
