"""What the registry needs of a tracked run."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.runs import BEST, CONFIG
from pipeline.tracking.store import asking, pointing_mlflow_at, require_there, resolve_tracking_uri


def fetch_run(run_id: str, tracking_uri: str | None, folder: Path) -> tuple[str, str, Path, Path]:
    """Download a run's configuration and its best checkpoint.

    Args:
        run_id: of the tracked run.
        tracking_uri: of the store; None: where runs are tracked.
        folder: where the files are put.

    Returns:
        The absolute address of the store, the run's id, the configuration and the checkpoint.

    Raises:
        UserError: there is no such run, or it was not brought to its end by ``fit``.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = resolve_tracking_uri(tracking_uri)
    require_there(uri)
    try:
        with asking(uri):
            mlflow.MlflowClient(uri, uri).get_run(run_id)
    except MlflowException as error:
        raise UserError(
            f"--run: expected the id of a run in {uri}, found none of '{run_id}'; it stands in the run's summary.json."
        ) from error
    try:
        with pointing_mlflow_at(uri):
            config, checkpoint = (
                Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{name}", dst_path=str(folder)))
                for name in (CONFIG, f"checkpoints/{BEST}")
            )
    except (MlflowException, OSError) as error:
        raise UserError(
            f"--run: expected {CONFIG} and checkpoints/{BEST} in run {run_id}, found that they are not there; use a "
            "run that `python -m pipeline fit` brought to its end."
        ) from error
    return uri, run_id, config, checkpoint


def run_tags(run_id: str, tracking_uri: str) -> dict[str, str]:
    """Tags of a run, without those of MLflow itself.

    Raises:
        UserError: there is no such run.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        with asking(tracking_uri):
            tags = MlflowClient(tracking_uri, tracking_uri).get_run(run_id).data.tags
    except MlflowException as error:
        raise UserError(
            f"expected run {run_id} in {tracking_uri}, found none; a version belongs to the run that trained it."
        ) from error
    return {name: value for name, value in tags.items() if not name.startswith("mlflow.")}
