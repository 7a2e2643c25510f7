"""The registered model as MLflow runs it: encoded images in, labels out.

MLflow executes a copy of this file, from the registered version's own folder, where nothing of this project is
installed; it needs numpy, Pillow, pandas and onnxruntime beside MLflow. The decoder and the geometry are copies of the
project's own, loaded under private names so that two versions in one process keep each their own code.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import numpy as np
import pandas as pd

_BATCH = 32


def load_private(path: Path) -> ModuleType:
    """A Python file as a module under a name that no other code can claim."""
    name = f"_bundled_{path.stem}_{abs(hash(str(path.resolve())))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


class Bundle:
    """A folder with ``model.onnx``, ``bundle.json`` and the code that prepares images.

    Args:
        folder: of the bundle.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        content = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
        self.classes: list[str] = content["classes"]
        self._decode = load_private(folder / "decode.py").decode
        preprocessing = load_private(folder / "preprocessing.py").Preprocessing
        self._fit_to_size = preprocessing.from_dict(content["preprocessing"]).fit_to_size
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def predict_bytes(self, images: list[bytes]) -> np.ndarray:
        """Probabilities, float32 ``(N, C)``, of encoded images.

        Raises:
            ValueError: an image cannot be read; the message names its row.
        """
        parts = [np.empty((0, len(self.classes)), np.float32)]
        for start in range(0, len(images), _BATCH):
            pixels = [self._pixels(start + i, image) for i, image in enumerate(images[start : start + _BATCH])]
            parts += self._session.run(["probabilities"], {"image": np.stack(pixels)})
        return np.concatenate(parts)

    def _pixels(self, row: int, image: bytes) -> np.ndarray:
        try:
            return self._fit_to_size(self._decode(bytes(image))).transpose(2, 0, 1)
        except (OSError, TypeError) as error:
            raise ValueError(f"row {row}: expected the bytes of an encoded image, found {error}") from error


class ImageClassifier(mlflow.pyfunc.PythonModel):
    """Answers a data frame with a binary column ``image`` by label, label_id, score and probabilities."""

    def load_context(self, context: Any) -> None:
        self.bundle = Bundle(Path(context.artifacts["bundle"]))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        # No annotations: MLflow would take them for the signature, which is logged with the model.
        probabilities = self.bundle.predict_bytes(list(model_input["image"]))
        labels = probabilities.argmax(axis=1)
        return pd.DataFrame(
            {
                "label": [self.bundle.classes[i] for i in labels],
                "label_id": labels.astype(np.int64),
                "score": probabilities.max(axis=1).astype(np.float64),
                "probabilities": probabilities.astype(np.float64).tolist(),
            }
        )


mlflow.models.set_model(ImageClassifier())
