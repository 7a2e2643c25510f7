"""From a trained model to a version in the MLflow model registry."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from datamodules import ImageDataModule
from pipeline.errors import UserError
from pipeline.evaluation.metrics import Estimate
from pipeline.evaluation.predictions import Predictions
from pipeline.registry.bundle import BUNDLE, DESCRIPTION, needs_tifffile, write_bundle, write_golden_samples
from pipeline.registry.card import CARD, write_card
from pipeline.registry.proof import Prover, keep_images, require_agreement
from pipeline.registry.tested import TESTED, Tested
from pipeline.registry.versions import CHALLENGER, PROVEN
from pipeline.task import ClassificationTask
from pipeline.tracking.store import is_away, pointing_mlflow_at, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

_GOLDEN_SAMPLES = 16
_LONGEST_DESCRIPTION = 5000  # characters that MLflow's databases keep
_REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "onnxruntime")


class StoreAwayError(UserError):
    """The tracking store, which holds the registry, does not answer."""


@dataclass(frozen=True)
class Candidate:
    """A trained model and its test.

    Attributes:
        task: the model.
        data: whose test split was tested.
        predictions: of it.
        metrics: by full name, such as ``test/accuracy``.
        tags: of the run.
        config_digest: of the configuration of the run.
        threshold: score below which the served model gives no label; None: it always gives one.
    """

    task: ClassificationTask
    data: ImageDataModule
    predictions: Predictions
    metrics: Mapping[str, Estimate]
    tags: Mapping[str, str]
    config_digest: str
    threshold: float | None = None

    def tested(self, contents: list[str]) -> Tested:
        """The test with the digests of its images."""
        images = self.data.images("test")
        return Tested(self.task.classes, images.paths, contents, self.predictions, images.groups, images.metadata)


def register(name: str, candidate: Candidate, tracking_uri: str, run_id: str) -> str:
    """Log the model in its run, register it, prove it, and only then call it ``challenger``.

    Before anything is logged the bundle must answer as the test did on images spread over the test split; afterwards
    the registered version must do so on all of them (see :class:`~pipeline.registry.proof.Prover`).

    Args:
        name: of the registered model.
        candidate: the model and its test.
        tracking_uri: absolute, of the store that has the run.
        run_id: of the run that the version will belong to.

    Returns:
        The version.

    Raises:
        UserError: the threshold is out of range, or given for a model of several classes an image.
        StoreAwayError: the store does not answer; no version is left that passes for proven.
        RuntimeError: the model answers otherwise than in its test; no version is left behind.
    """
    require_threshold(candidate.threshold, candidate.predictions.multi_label)
    try:
        return _register(name, candidate, tracking_uri, run_id)
    except Exception as error:
        if is_away(error):
            raise StoreAwayError(
                f"expected the tracking server '{without_password(tracking_uri)}' to answer, found that it does not; "
                "try again when it is there."
            ) from error
        raise


def _register(name: str, candidate: Candidate, tracking_uri: str, run_id: str) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri, tracking_uri)
    with tempfile.TemporaryDirectory() as scratch, pointing_mlflow_at(tracking_uri):
        bundle, images = Path(scratch) / BUNDLE, Path(scratch) / "images"
        bundle.mkdir()
        images.mkdir()
        with Prover(tracking_uri, images) as prover:
            read = candidate.data.images("test").encoded
            tested = candidate.tested(keep_images(images, read, len(candidate.predictions.probabilities)))
            chosen = np.unique(np.linspace(0, len(tested.paths) - 1, _GOLDEN_SAMPLES).astype(int))
            golden = [read(int(index)) for index in chosen]
            _fill(bundle, name, candidate, tested, run_id)
            expected = candidate.predictions.probabilities[chosen]
            write_golden_samples(bundle, golden, expected)
            require_agreement(
                _served(bundle, golden), expected, tested.predictions.multi_label, "The model to be registered"
            )
            with _active(client, run_id):
                model_id, address = _log(bundle, candidate, golden[:1])
            with _version(client, name, address, model_id) as version:
                familiarity = candidate.task.familiarity
                step = None if familiarity is None else familiarity.step
                prover.prove(f"models:/{name}/{version}", tested, candidate.threshold, step)
                client.set_model_version_tag(name, version, PROVEN, tested.digest)
                client.update_model_version(name, version, _shortened((bundle / CARD).read_text(encoding="utf-8")))
                client.set_registered_model_alias(name, CHALLENGER, version)
    return version


def _shortened(card: str) -> str:
    """What fits of a model card into the description of a version, which MLflow's page shows."""
    if len(card) <= _LONGEST_DESCRIPTION:
        return card
    rest = f"\n\n(The rest is in the version's {CARD}.)\n"
    return card[: _LONGEST_DESCRIPTION - len(rest)].rpartition("\n")[0] + rest


def require_threshold(threshold: float | None, multi_label: bool) -> None:
    """Refuse a threshold that no score can be compared with.

    Raises:
        UserError: see above.
    """
    if threshold is None:
        return
    if multi_label:
        raise UserError("--threshold: expected none where an image may have several classes, or none; leave it out.")
    if not 0 < threshold <= 1:
        raise UserError(f"--threshold: expected a score above 0 and at most 1, found {threshold:g}.")


def _fill(bundle: Path, name: str, candidate: Candidate, tested: Tested, run_id: str) -> None:
    description = {
        "run_id": run_id,
        "config_digest": candidate.config_digest,
        "data": {
            "digest": candidate.data.table.digest,
            "test_digest": tested.digest,
            "test_images": len(tested.paths),
        },
        "tags": dict(candidate.tags),
        "metrics": {metric: estimate.to_dict() for metric, estimate in candidate.metrics.items()},
    }
    write_bundle(bundle, candidate.task, description, candidate.threshold)
    tested.write(bundle / TESTED)
    content = json.loads((bundle / DESCRIPTION).read_text(encoding="utf-8"))
    (bundle / CARD).write_text(write_card(name, content, candidate.metrics, tested), encoding="utf-8")


def _served(bundle: Path, images: list[bytes]) -> NDArray[np.float64]:
    """What the registered code answers to images, run in this process."""
    import pandas as pd

    from pipeline.registry.served import ImageClassifier

    model = ImageClassifier()
    model.load_context(SimpleNamespace(artifacts={"bundle": str(bundle)}))
    return np.array(model.predict(None, pd.DataFrame({"image": images}))["probabilities"].tolist())


def _log(bundle: Path, candidate: Candidate, example: list[bytes]) -> tuple[str, str]:
    """Id and address of the model logged in the active run."""
    import mlflow
    import pandas as pd

    record = candidate.task.hparams["preprocessing"]
    needs = [*_REQUIREMENTS, *(["tifffile", "imagecodecs"] if needs_tifffile(record) else [])]
    logged = mlflow.pyfunc.log_model(
        name="model",
        python_model=str(Path(__file__).with_name("served.py")),
        artifacts={BUNDLE: str(bundle)},
        signature=_signature(candidate.predictions.multi_label, candidate.task.familiarity is not None),
        input_example=pd.DataFrame({"image": example}),
        pip_requirements=[f"{package}=={installed(package)}" for package in needs],
    )
    return logged.model_id, logged.model_uri


def _signature(multi_label: bool, knows_familiarity: bool) -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    outputs = [
        ColSpec(DataType.string, "label"),
        ColSpec(DataType.long, "label_id"),
        ColSpec(DataType.double, "score"),
    ]
    if multi_label:
        outputs = [ColSpec(Array(DataType.string), "labels")]
    outputs += [
        ColSpec(Array(DataType.double), "probabilities"),
        *([ColSpec(DataType.double, "familiarity")] if knows_familiarity else []),
        ColSpec(Array(DataType.string), "top_labels", required=False),
        ColSpec(Array(DataType.double), "top_scores", required=False),
    ]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(outputs),
        params=ParamSchema([ParamSpec("top_k", DataType.long, 0)]),
    )


@contextlib.contextmanager
def _active(client: "MlflowClient", run_id: str) -> Iterator[None]:
    """Make a run MLflow's active one; afterwards it is as finished, or not, as before."""
    import mlflow

    before = client.get_run(run_id).info
    try:
        with mlflow.start_run(run_id=run_id):
            yield
    finally:
        if before.status == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        else:
            client.set_terminated(run_id, before.status, before.end_time)


@contextlib.contextmanager
def _version(client: "MlflowClient", name: str, address: str, model_id: str) -> Iterator[str]:
    """A logged model as a new version of a registered model; when the block fails, nothing of either is left."""
    import mlflow

    ours = False
    version = None
    try:
        ours = _create(client, name)
        version = str(mlflow.register_model(address, name).version)
        yield version
    except BaseException:
        if version is not None:
            client.delete_model_version(name, version)
        if ours and not client.search_model_versions(f"name='{name}'"):
            client.delete_registered_model(name)
        client.delete_logged_model(model_id)
        raise


def _create(client: "MlflowClient", name: str) -> bool:
    """Make a registered model; False where there is one."""
    from mlflow.exceptions import RESOURCE_ALREADY_EXISTS, ErrorCode, MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
        return False
    return True
