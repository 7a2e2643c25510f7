"""Fine-tuning what was registered: from a ``models:/`` address to a file of weights."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.registry.bundle import BUNDLE, WEIGHTS
from pipeline.registry.loading import pin
from pipeline.tracking.store import pointing_mlflow_at


def registered_weights(address: str, tracking_uri: str | None, folder: Path) -> tuple[str, Path]:
    """Fetch the weights of a registered model.

    Args:
        address: ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.
        tracking_uri: of the registry; None: where runs are tracked.
        folder: where the file is put.

    Returns:
        The address with the version in place of an alias, which may point elsewhere tomorrow, and the file.

    Raises:
        UserError: there is no such model, alias or version, or it was not registered by this project.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    pinned, uri = pin(address, tracking_uri, "model.weights")
    try:
        with pointing_mlflow_at(uri):
            path = mlflow.artifacts.download_artifacts(f"{pinned}/artifacts/{BUNDLE}/{WEIGHTS}", dst_path=str(folder))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"model.weights: expected the weights of {pinned} in {uri}, found no {WEIGHTS} in it; use a version that "
            "this project registered."
        ) from error
    return pinned, Path(path)
