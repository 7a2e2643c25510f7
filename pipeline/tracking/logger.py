"""A Lightning logger that keeps one MLflow run from the first setting to the registered model."""

import getpass
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from pipeline.errors import UserError
from pipeline.tracking.store import prepare_store, resolve_tracking_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's own limits, for stores of every kind.
_LONGEST_VALUE = 6000
_LONGEST_TAG = 5000
_LARGEST_BATCH = 100
_BUFFERED_METRICS = 200


class MLflowLogger(Logger):
    """Tracks a run in MLflow; only the process of rank 0 talks to the store.

    Unlike Lightning's own logger it stays open after ``trainer.fit``, because testing and registration belong to the
    same run; the owner ends it with :meth:`closing`.

    Args:
        experiment_name: groups runs.
        tracking_uri: the store; None: ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in the working folder.
        run_name: name of a new run.
        run_id: an existing run to go on with.
    """

    def __init__(
        self,
        experiment_name: str = "pipeline",
        tracking_uri: str | None = None,
        run_name: str | None = None,
        run_id: str | None = None,
    ) -> None:
        super().__init__()
        #: Absolute address of the store.
        self.tracking_uri = resolve_tracking_uri(tracking_uri)
        self.experiment_name = experiment_name
        self.experiment_id: str | None = None
        self.run_name = run_name
        self.run_id = run_id
        self._client: MlflowClient | None = None
        self._metrics: list[Any] = []

    @property
    def name(self) -> str:
        return self.experiment_name

    @property
    def version(self) -> str | None:
        return self.run_id

    @property
    @rank_zero_experiment
    def experiment(self) -> "MlflowClient":
        """The client; the run exists once this has been read."""
        if self._client is not None:
            return self._client
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            prepare_store(self.tracking_uri)
        except (MlflowException, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"logger.tracking_uri: expected an MLflow store that can be reached, found '{self.tracking_uri}' "
                f"({reason}); correct it or MLFLOW_TRACKING_URI, or leave both out for a local store."
            ) from error
        # The registry lives beside the runs; without a second argument the environment would decide.
        client = MlflowClient(self.tracking_uri, self.tracking_uri)
        if self.run_id is None:
            # Who and what, under the names by which MLflow's pages show them.
            tags = {"mlflow.user": _user(), "mlflow.source.name": "python -m pipeline", "mlflow.source.type": "LOCAL"}
            run = client.create_run(self._find_experiment(client), tags=tags, run_name=self.run_name)
            self.run_id = run.info.run_id
        else:
            client.update_run(self.run_id, status="RUNNING")
        self.experiment_id = client.get_run(self.run_id).info.experiment_id
        self._client = client
        return client

    def _find_experiment(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.experiment_name)
        if found is None:
            try:
                return client.create_experiment(self.experiment_name)
            except MlflowException:  # another run has just created it
                found = client.get_experiment_by_name(self.experiment_name)
                if found is None:
                    raise
        return found.experiment_id

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any) -> None:
        """Parameters by name; nested ones are joined with dots."""
        from mlflow.entities import Param

        flat = dict(_flatten(vars(params) if isinstance(params, Namespace) else params))
        known = self.experiment.get_run(self.run_id).data.params  # a resumed run has them, and they cannot change
        entries = [Param(key, str(value)[:_LONGEST_VALUE]) for key, value in flat.items() if key not in known]
        for start in range(0, len(entries), _LARGEST_BATCH):
            self.experiment.log_batch(self.run_id, params=entries[start : start + _LARGEST_BATCH])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric

        _ = self.experiment  # the run begins with its first metric at the latest
        now = int(time() * 1000)
        self._metrics += [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
        if len(self._metrics) >= _BUFFERED_METRICS:
            self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Send the metrics that wait to be sent."""
        waiting, self._metrics = self._metrics, []
        if waiting:
            self.experiment.log_batch(self.run_id, metrics=waiting)

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags by name; they replace earlier ones."""
        for name, value in tags.items():
            self.experiment.set_tag(self.run_id, name, value[:_LONGEST_TAG])

    @rank_zero_only
    def log_file(self, path: Path, folder: str | None = None) -> None:
        """A file as an artifact."""
        self.experiment.log_artifact(self.run_id, str(path), folder)

    @rank_zero_only
    def log_figure(self, figure: "Figure", name: str) -> None:
        """A figure as an image artifact."""
        self.experiment.log_figure(self.run_id, figure, name)

    @rank_zero_only
    def log_dataset(self, name: str, digest: str, source: str, profile: str) -> None:
        """The data of the run, shown by MLflow as its dataset.

        Args:
            name: of the data.
            digest: of every row (MLflow keeps the first 36 characters).
            source: where it was read.
            profile: what is in it, as JSON.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest[:36], source_type="local", source=source, profile=profile)
        tags = [InputTag("mlflow.data.context", "training")]
        self.experiment.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Called by the trainer after each of its stages; the run stays open (see :meth:`closing`)."""
        if self._client is not None:
            self.flush()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """End the run with the block: FINISHED, KILLED where the person interrupted it, FAILED for anything else."""
        try:
            yield
        except KeyboardInterrupt:
            self._close("KILLED")
            raise
        except BaseException:
            self._close("FAILED")
            raise
        self._close("FINISHED")

    @rank_zero_only
    def _close(self, status: Status) -> None:
        if self._client is None:
            return
        try:
            self.flush()
        finally:
            self._client.set_terminated(self.run_id, status)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # containers may run under a number without a name
        return "unknown"


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
