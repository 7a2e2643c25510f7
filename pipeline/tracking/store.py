"""Where runs are tracked, and making sure that a local store is there."""

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

_SQLITE = "sqlite:///"
DEFAULT_URI = _SQLITE + "mlflow.db"


def resolve_tracking_uri(tracking_uri: str | None) -> str:
    """The address of the tracking store, absolute, so that it means the same in any folder.

    Args:
        tracking_uri: as given; None: the environment's ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` here, which is
            what a bare ``mlflow ui`` opens.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    if uri.startswith(_SQLITE):
        return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).resolve())
    return uri


def prepare_store(tracking_uri: str) -> None:
    """Create the tables of a local SQLite store, once, whichever process comes first.

    Several processes that open a fresh store at once race in its migrations and leave it broken.

    Args:
        tracking_uri: an absolute address; of other kinds it is only asked whether MLflow knows them.

    Raises:
        OSError: the file cannot be written.
        MlflowException: MLflow has no store for such an address, or cannot open it.
    """
    from mlflow import MlflowClient

    if not tracking_uri.startswith(_SQLITE):
        MlflowClient(tracking_uri, tracking_uri)
        return

    file = Path(tracking_uri.removeprefix(_SQLITE))
    # Asked first, because MLflow would try again for minutes.
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OSError(f"'{file}' cannot be written")
    name = hashlib.sha256(tracking_uri.encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"transfer-pipeline-{name}.lock"):
        MlflowClient(tracking_uri, tracking_uri).search_experiments(max_results=1)


@contextlib.contextmanager
def pointing_mlflow_at(uri: str) -> Iterator[None]:
    """Let MLflow's functions without a client, which logging and fetching a model need, talk to a store.

    MLflow keeps the address in the environment, too, where it would lead later runs of the process astray. While the
    block runs, its progress reports are held back; what goes wrong it raises.
    """
    import mlflow

    tracking, registry = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("MLFLOW_REGISTRY_URI")
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        mlflow.set_tracking_uri(tracking)  # None is its way to unset it
        mlflow.set_registry_uri(registry)
        if registry is None:
            os.environ.pop("MLFLOW_REGISTRY_URI", None)
