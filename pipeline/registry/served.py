"""The registered model as MLflow runs it: encoded images in, labels out.

MLflow executes a copy of this file where nothing of this project is installed. What it needs of the project lies
beside the network in the bundle, and is loaded from there.
"""

from collections.abc import Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

_PRESENT = 0.5
_ABSTAINED = -1


class ImageClassifier(mlflow.pyfunc.PythonModel):
    """Answers a data frame with a binary column ``image`` by ``label``, ``label_id``, ``score``, ``probabilities``.

    Where an image may have several classes: by ``labels``, those with a probability of at least one half, and
    ``probabilities``. Where it was measured, ``familiarity`` follows, the share of held-out images that are no less
    strange: near 0, an image is of another kind than those trained on, whatever its score. With the parameter ``top_k``
    above 0 come ``top_labels`` and ``top_scores``, the most probable first. Where the score is below the model's
    threshold, if it has one, the label is empty and its number -1.
    """

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["bundle"])
        loader = SourceFileLoader("_bundled_inference", str(folder / "inference.py"))
        inference = ModuleType(loader.name)
        loader.exec_module(inference)
        self.bundle = inference.Bundle(folder)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        try:
            if "image" not in model_input:
                raise ValueError(f"expected a column image of encoded bytes, found {', '.join(map(str, model_input))}")
            return self._answer(self.bundle.predict(list(model_input["image"])), int((params or {}).get("top_k", 0)))
        except ValueError as error:
            # A server answers this with 400 and the text, but any other error with a trace of our files.
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def predict_arrays(self, images: NDArray[Any], top_k: int = 0) -> pd.DataFrame:
        """The same for decoded images, ``model.unwrap_python_model().predict_arrays(images)``.

        Args:
            images: ``(N, H, W, C)``, most often RGB of uint8, of any one size; not normalised.
            top_k: of the most probable classes.

        Raises:
            ValueError: the shape or the type is not what the model was trained on.
        """
        return self._answer(self.bundle.predict_arrays(images), top_k)

    def predict_each(self, images: Iterable[bytes]) -> pd.DataFrame:
        """The same where some images may be unreadable, ``model.unwrap_python_model().predict_each(images)``.

        Args:
            images: encoded.

        Returns:
            A row for each image, with a further column ``error``: None, or why the image cannot be read and all else
            is missing.
        """
        said, reasons = self.bundle.predict_each(images)
        answers = self._answer(said, 0).astype(object)  # whole numbers stay whole beside what is missing
        answers.index = pd.Index([row for row, reason in enumerate(reasons) if reason is None], dtype="int64")
        return answers.reindex(range(len(reasons))).assign(error=pd.Series(reasons, dtype=object))

    def _answer(self, said: Any, top_k: int) -> pd.DataFrame:
        classes = self.bundle.classes
        if not 0 <= top_k <= len(classes):
            raise ValueError(f"top_k: expected 0 to {len(classes)}, the number of classes, found {top_k}")
        probabilities = said.probabilities.astype("float64")
        if self.bundle.multi_label:
            columns: dict[str, Any] = {
                "labels": [[classes[i] for i in (row >= _PRESENT).nonzero()[0]] for row in probabilities]
            }
        else:
            scores, labels = probabilities.max(axis=1), probabilities.argmax(axis=1)
            if self.bundle.threshold is not None:
                labels = np.where(scores >= self.bundle.threshold, labels, _ABSTAINED)
            names = [classes[i] if i != _ABSTAINED else "" for i in labels]
            columns = {"label": names, "label_id": labels.astype("int64"), "score": scores}
        columns["probabilities"] = probabilities.tolist()
        if said.familiarity is not None:
            columns["familiarity"] = said.familiarity.astype("float64")
        if top_k:
            best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
            columns["top_labels"] = [[classes[i] for i in row] for row in best]
            columns["top_scores"] = np.take_along_axis(probabilities, best, axis=1).tolist()
        return pd.DataFrame(columns)


mlflow.models.set_model(ImageClassifier())
