"""Where runs are tracked, and making sure that a local store is there."""

import hashlib
import os
import tempfile
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
