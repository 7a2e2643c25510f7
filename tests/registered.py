"""A run whose model is registered, for the tests of what a registered model does."""

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient

from pipeline.cli import main
from tests.support import fast, write_images


class Run:
    """A finished ``fit``, which registers nothing by itself.

    Args:
        home: folder for it.
        told: more arguments.
    """

    def __init__(self, home: Path, *told: str) -> None:
        self.home = home
        self.images = home / "images"
        write_images(self.images, per_class=30)
        arguments = [*fast(self.images), "--trainer.max_epochs=2", *told]
        with contextlib.chdir(home):
            assert main(["fit", *arguments]) == 0
        (self.folder,) = (home / "runs").iterdir()
        self.checkpoint = self.folder / "best.ckpt"
        self.summary = json.loads((self.folder / "summary.json").read_text())
        self.uri = self.summary["tracking_uri"]
        self.client = MlflowClient(self.uri, self.uri)

    def register(self, name: str, *arguments: str) -> int:
        return main(["register", f"--name={name}", f"--checkpoint={self.checkpoint}", *arguments])

    def load(self, name: str) -> Any:
        mlflow.set_tracking_uri(self.uri)
        try:
            return mlflow.pyfunc.load_model(f"models:/{name}@challenger")
        finally:
            mlflow.set_tracking_uri(None)

    @property
    def tested(self) -> list[dict[str, str]]:
        with (self.folder / "predictions.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    @property
    def logged_models(self) -> int:
        return len(self.client.search_logged_models([self.summary["experiment_id"]]))


def frame(images: list[Path]) -> pd.DataFrame:
    return pd.DataFrame({"image": [path.read_bytes() for path in images]})
