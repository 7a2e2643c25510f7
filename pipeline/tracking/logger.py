"""A Lightning logger that keeps one MLflow run from the first setting to the registered model."""

import getpass
import json
import os
import secrets
import socket
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.runs import note_tracked
from pipeline.tracking.journal import Journal, RunBusyError, RunLock, plain, read_entries
from pipeline.tracking.replay import Replay
from pipeline.tracking.sender import Sender
from pipeline.tracking.store import require_store, resolve_tracking_uri, where_to_look
from pipeline.tracking.sync import Recovery, missing_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's own limits, for stores of every kind.
_LONGEST_VALUE = 6000
_LONGEST_TAG = 8000
_LONGEST_DIGEST = 36


class MLflowLogger(Logger):
    """Tracks a run in MLflow without ever waiting for it; only the process of rank 0 tracks.

    Every operation is appended to a journal in the run folder, from which a thread sends it to the store. So what the
    store does (it is away, hangs, or comes back) neither holds up the training nor costs a point; what it lacks at the
    end is sent by ``python -m pipeline sync <run folder>``.

    Unlike Lightning's own logger it stays open after ``trainer.fit``, because testing and registration belong to the
    same run; the owner ends it with :meth:`closing`. A folder that has a journal is gone on with, in the same run.

    Args:
        experiment_name: groups runs.
        tracking_uri: the store; None: ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in the working folder.
        folder: of the run; its name is that of the run.
    """

    def __init__(self, experiment_name: str = "pipeline", tracking_uri: str | None = None, *, folder: Path) -> None:
        super().__init__()
        #: Absolute address of the store.
        self.tracking_uri = resolve_tracking_uri(tracking_uri)
        self.experiment_name = experiment_name
        self.folder = folder
        self._key = ""
        self._lock = RunLock(folder)
        self._replay = Replay(folder, self.tracking_uri)
        self._sender = Sender(self._replay)
        self._recovery = Recovery(folder)
        self._open: Journal | None = None
        self._tables: list[str] = []

    @property
    def name(self) -> str:
        return self.experiment_name

    @property
    def version(self) -> str | None:
        return self.run_id

    @property
    def run_id(self) -> str | None:
        """Of the tracked run; None until the store has answered."""
        return self._replay.sent.run_id

    @property
    def experiment_id(self) -> str | None:
        """Of the tracked run; None until the store has answered."""
        return self._replay.sent.experiment_id

    @property
    @rank_zero_experiment
    def experiment(self) -> "MlflowClient":
        """The client, for what the logger does not do itself; made when it is first asked for, as Lightning does.

        Raises:
            UserError: the address can never work. (A server is not asked whether it is there.)
        """
        require_store(self.tracking_uri)
        return self._replay.client

    @property
    def _journal(self) -> Journal:
        """The run begins, or goes on, with its first operation."""
        if self._open is None:
            _ = self.experiment
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except RunBusyError as error:
                raise UserError(
                    f"expected to track the run in '{self.folder}', found that it is still being trained by process "
                    f"{error.process}; wait until that has ended."
                ) from error
            self._open = Journal(self.folder)
            self._begin(self._open)
            self._sender.start()
            self._recovery.start()
        return self._open

    def _begin(self, journal: Journal) -> None:
        first = next(read_entries(self.folder), None)
        if first is not None:
            self._key = first.content["key"]
            journal.append("resume", {})
            return
        self._key = secrets.token_hex(16)
        # Who, what and where, under the names by which MLflow's pages show them.
        tags = {
            "mlflow.user": _user(),
            "mlflow.source.name": "python -m pipeline",
            "mlflow.source.type": "LOCAL",
            "host": socket.gethostname(),
        }
        begin = {
            "key": self._key,
            "tracking_uri": self.tracking_uri,
            "experiment": self.experiment_name,
            "run_name": self.folder.name,
            "tags": tags,
        }
        journal.append("begin", begin)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any) -> None:
        """Parameters by name; nested ones are joined with dots."""
        flat = _flatten(vars(params) if isinstance(params, Namespace) else params)
        self._journal.append("params", {"values": {name: str(value)[:_LONGEST_VALUE] for name, value in flat}})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Metrics by name; NaN and infinities are kept as such."""
        self._journal.append("metrics", {"step": 0 if step is None else step, "values": plain(metrics)})

    @rank_zero_only
    def flush(self) -> None:
        """Have what waits sent now."""
        self._sender.wake()

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags by name; they replace earlier ones."""
        self._journal.append("tags", {"values": {name: value[:_LONGEST_TAG] for name, value in tags.items()}})

    @rank_zero_only
    def log_file(self, path: Path, folder: str | None = None) -> None:
        """A file as an artifact; it must stay where it is until it is sent."""
        inside = path.resolve().is_relative_to(self.folder.resolve())
        # A run folder can be moved before it is synchronised.
        file = os.path.relpath(path.resolve(), self.folder.resolve()) if inside else str(path.resolve())
        self._journal.append("artifact", {"file": file, "target": folder})

    @rank_zero_only
    def log_figure(self, figure: "Figure", name: str) -> None:
        """A figure as an image, in the run folder and as an artifact."""
        _ = self._journal  # makes the folder
        figure.savefig(self.folder / name)
        self.log_file(self.folder / name)

    @rank_zero_only
    def log_table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], name: str) -> None:
        """A table, in the run folder and as an artifact that MLflow's page shows as one.

        Args:
            columns: their names.
            rows: plain values.
            name: of the file, ending in ``.json``.
        """
        _ = self._journal  # makes the folder
        content = json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}, ensure_ascii=False)
        (self.folder / name).write_text(content + "\n", encoding="utf-8")
        self.log_file(self.folder / name)
        self._tables.append(name)
        # By this MLflow's page knows which artifacts are tables.
        self.set_tags({"mlflow.loggedArtifacts": json.dumps([{"path": n, "type": "table"} for n in self._tables])})

    @rank_zero_only
    def log_dataset(self, name: str, digest: str, source: str, profile: str) -> None:
        """The data of the run, shown by MLflow as its dataset.

        Args:
            name: of the data.
            digest: of every row (MLflow keeps the first 36 characters).
            source: where it was read.
            profile: what is in it, as JSON.
        """
        dataset = {"name": name, "digest": digest[:_LONGEST_DIGEST], "source": source, "profile": profile}
        self._journal.append("inputs", {"dataset": dataset})

    def settle(self, seconds: float) -> bool:
        """Wait until the store has everything, for as long as it gets on.

        Args:
            seconds: that a store which is away has to come back.
        """
        return self._sender.drain(seconds)

    @property
    def failure(self) -> str | None:
        """Why nothing can be sent now; None where it can."""
        return self._sender.failure

    def where_to_look(self) -> list[str]:
        """Lines that say how a person gets to see the run, or what to do before."""
        if self.run_id is None or self.experiment_id is None:
            return [f"python -m pipeline sync {self.folder}"]
        return where_to_look(self.tracking_uri, self.experiment_id, self.run_id)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Called by the trainer after each of its stages; the run stays open (see :meth:`closing`)."""
        self._sender.wake()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """End the run with the block: FINISHED, KILLED where the person interrupted it, FAILED for anything else.

        Waits for the store for as long as that gets on, and some seconds more; what it lacks then is told.
        """
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
        if self._open is None:
            return
        self._open.append("end", {"key": self._key, "status": status})
        self._open.close()
        self._open = None
        try:
            complete = self._sender.drain()
            self._recovery.stop()
        finally:
            self._sender.stop()
            self._lock.release()
        if self.run_id is not None and self.experiment_id is not None:
            note_tracked(self.folder, self.run_id, self.experiment_id)  # in the summary, which came after it was known
        for line in missing_lines(self._replay, complete, self._sender.failure):
            say(line)


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
