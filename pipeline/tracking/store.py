"""Where runs are tracked, making sure that a local store is there, and speaking to it."""

import contextlib
import hashlib
import io
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from pipeline.errors import UserError
from pipeline.tracking.fresh import lay_out

_SQLITE = "sqlite:///"
DEFAULT_URI = _SQLITE + "mlflow.db"

# MLflow takes addresses and limits from the environment, which all threads share: one at a time speaks to it.
_speaking = threading.RLock()
_MODEL_SECONDS = 60  # for an answer about a model
_ASKING_SECONDS = 20
_PASSWORD = re.compile(r"^([^/]+://[^:/@]*:)[^@]*(@)")
# What no repetition changes. (Not among them: a person who may not write, who can be let in.)
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "INVALID_STATE")


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
        lay_out(file)
        MlflowClient(tracking_uri, tracking_uri).search_experiments(max_results=1)


def require_store(tracking_uri: str) -> None:
    """Refuse an address that can never work; a server is not asked whether it is there.

    Raises:
        UserError: MLflow has no store for it, or the file cannot be written.
    """
    from mlflow.exceptions import MlflowException

    try:
        prepare_store(tracking_uri)
    except (MlflowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            "logger.tracking_uri: expected an MLflow store that can be reached, found "
            f"'{without_password(tracking_uri)}' ({reason}); correct it or "
            "MLFLOW_TRACKING_URI, or leave both out for a local store."
        ) from error


@contextlib.contextmanager
def speaking(seconds: int, retries: int = 0) -> Iterator[None]:
    """Let MLflow try a request for a short time only; by itself it may take minutes to say that a server is away.

    Args:
        seconds: for an answer, where the environment does not say something else.
        retries: of one request.
    """
    ours = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", str(seconds)),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
    }
    with _speaking:
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def is_refusal(error: BaseException) -> bool:
    """Whether the store has understood a request and does not take what is in it."""
    return getattr(error, "error_code", None) in _REFUSALS


def is_missing(error: BaseException) -> bool:
    """Whether the store says that it does not have what a request is about."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def is_away(error: BaseException) -> bool:
    """Whether something failed because a server could not be reached, or said that it cannot answer now."""
    from requests.exceptions import RequestException

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RequestException):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


@contextlib.contextmanager
def asking(tracking_uri: str) -> Iterator[None]:
    """Ask a store in the block for what it has, and do not wait for minutes for an answer.

    Raises:
        UserError: it is a server that does not answer, or MLflow has no store for such an address.
    """
    from mlflow.exceptions import MlflowException

    try:
        with speaking(_ASKING_SECONDS, retries=1):
            yield
    except MlflowException as error:
        if is_away(error):
            raise UserError(
                f"expected the tracking server '{without_password(tracking_uri)}' to answer, found that it does not; "
                "try again when it is there, or correct its address."
            ) from error
        raise


def require_there(tracking_uri: str) -> None:
    """Refuse an address where nothing can have been tracked, and make nothing there.

    Raises:
        UserError: MLflow has no store for it, or there is no such file.
    """
    if tracking_uri.startswith(_SQLITE) and not Path(tracking_uri.removeprefix(_SQLITE)).is_file():
        raise UserError(
            f"tracking_uri: expected a store that runs were tracked in, found none at '{tracking_uri}'; go to the "
            "folder of the runs, or give the address that `fit` printed."
        )
    require_store(tracking_uri)


def without_password(tracking_uri: str) -> str:
    """An address for people to read.

    Example:
        >>> without_password("postgresql://ada:secret@host/db")
        'postgresql://ada:***@host/db'
    """
    return _PASSWORD.sub(r"\1***\2", tracking_uri)


def where_to_look(tracking_uri: str, experiment_id: str, run_id: str) -> list[str]:
    """Lines that say how a person gets to see a run."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}"
    shown = without_password(tracking_uri)
    if tracking_uri.startswith("http"):
        return [f"open {shown.rstrip('/')}/{page}"]
    return [f"mlflow ui --backend-store-uri {shown}", f"  and open http://127.0.0.1:5000/{page}"]


@contextlib.contextmanager
def pointing_mlflow_at(uri: str) -> Iterator[None]:
    """Let MLflow's functions without a client, which logging and fetching a model need, talk to a store.

    MLflow keeps the address in the environment, too, where it would lead later runs of the process astray. While the
    block runs, its progress reports are held back; what goes wrong it raises.
    """
    import mlflow

    with speaking(_MODEL_SECONDS, retries=2):
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
