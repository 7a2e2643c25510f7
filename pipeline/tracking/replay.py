"""Sending the journal of a run to its tracking store: at least once each operation, and what arrives is there once.

Every operation can be repeated without harm. The run is looked for by a key of its own before it is created; MLflow
ignores a metric point that equals one it has in name, time, step and value, and a parameter that has its value; tags,
artifacts and the status replace what was there. So a position that is kept after the server has answered is enough.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runs import note_tracked
from pipeline.tracking.journal import JOURNAL, Entry, read_entries
from pipeline.tracking.store import is_missing, is_refusal, speaking

if TYPE_CHECKING:
    from mlflow import MlflowClient

SENT = "journal.sent.json"
#: Tag that holds the key of a run.
KEY = "pipeline.key"

# MLflow's own limits of one request, for stores of every kind.
_MOST_METRICS = 1000
_MOST_PARAMETERS = 100
# An upload to a store that passes it on is answered late.
_UPLOAD_SECONDS = 300
_REQUEST_SECONDS = 20


@dataclass
class Sent:
    """What the tracking store has of a journal.

    Attributes:
        position: in the journal, in bytes; what lies before was acknowledged.
        run_id: of the tracked run, once it is known.
        experiment_id: likewise.
        deferred: artifacts that could not be sent where they stood; they must not keep metrics back.
        refused: what the store does not take, with its reason.
    """

    position: int = 0
    run_id: str | None = None
    experiment_id: str | None = None
    deferred: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "Sent":
        """Of a run folder; at the beginning where nothing was sent yet."""
        file = folder / SENT
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else cls()

    def write(self, folder: Path) -> None:
        """Keep it; it appears whole or not at all."""
        unfinished = folder / f"{SENT}.part"
        unfinished.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")
        unfinished.replace(folder / SENT)


class Replay:
    """Sends what a journal holds beyond what the store has acknowledged.

    Args:
        folder: of the run.
        tracking_uri: of the store.
    """

    def __init__(self, folder: Path, tracking_uri: str) -> None:
        self.folder = folder
        self.tracking_uri = tracking_uri
        self.sent = Sent.read(folder)
        self._client: MlflowClient | None = None

    @property
    def client(self) -> "MlflowClient":
        """Made when it is first needed."""
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self.tracking_uri, self.tracking_uri)
        return self._client

    @property
    def done(self) -> bool:
        """Whether the store has everything."""
        file = self.folder / JOURNAL
        return not self.sent.deferred and (not file.is_file() or file.stat().st_size <= self.sent.position)

    def missing(self) -> int:
        """Number of operations that the store does not have."""
        return sum(1 for _ in read_entries(self.folder, self.sent.position)) + len(self.sent.deferred)

    def upload(self) -> int:
        """Size in bytes of the file whose turn it is; 0 where it is no file's turn."""
        entry = next(read_entries(self.folder, self.sent.position), None)
        content = entry.content if entry is not None and entry.operation == "artifact" else None
        if entry is None and self.sent.deferred:
            content = self.sent.deferred[0]
        file = self.folder / content["file"] if content is not None else None
        return file.stat().st_size if file is not None and file.is_file() else 0

    def step(self) -> bool:
        """Send the next batch.

        Returns:
            Whether there was one.

        Raises:
            Exception: of whatever kind the store or its artifacts raise; nothing is lost, the same is sent again.
        """
        batch = self._next_batch()
        if not batch and not self.sent.deferred:
            return False
        try:
            if batch:
                self._perform(batch)
                self.sent.position = batch[-1].end
            else:
                self._upload(self.sent.deferred[0])
                self.sent.deferred.pop(0)
        except Exception as error:
            if is_missing(error) and self.sent.run_id is not None:
                # The store no longer knows the run: its data was lost. The journal has everything.
                self.sent = Sent()
                self.sent.write(self.folder)
            raise
        self.sent.write(self.folder)
        return True

    def _next_batch(self) -> list[Entry]:
        """Metrics for one request, or one other operation."""
        batch: list[Entry] = []
        metrics = 0
        for entry in read_entries(self.folder, self.sent.position):
            metrics += len(entry.content["values"]) if entry.operation == "metrics" else 0
            if batch and (entry.operation != "metrics" or metrics > _MOST_METRICS):
                break
            batch.append(entry)
            if entry.operation != "metrics":
                break
        return batch

    def _perform(self, batch: Sequence[Entry]) -> None:
        entry, content = batch[0], batch[0].content
        if entry.operation == "artifact":
            try:
                self._upload(content)
            except Exception:
                # Artifacts may lie elsewhere than the rest. Where the server is away, the next operation says so.
                self.sent.deferred.append(content)
            return
        with speaking(_REQUEST_SECONDS):
            match entry.operation:
                case "begin":
                    self._begin(entry)
                case "resume":
                    self._offer(["RUNNING"], lambda status: self.client.update_run(self.sent.run_id, status[0]))
                case "metrics":
                    self._log_metrics(batch)
                case "params":
                    self._log_parameters(content["values"])
                case "tags":
                    for name, value in content["values"].items():
                        self._offer([(name, value)], self._set_tag)
                case "inputs":
                    self._offer([content], self._log_inputs)
                case "end":
                    self._offer([content["status"]], lambda status: self._end(content["key"], status[0], entry.time))
                case _:
                    self.sent.refused.append(f"a line that cannot be read: {content}")

    def _begin(self, entry: Entry) -> None:
        content = entry.content
        experiment_id = self._find_experiment(content["experiment"])
        there = self._find_runs(experiment_id, content["key"])
        if there:
            run_id = there[0]
        else:
            tags = {**content["tags"], KEY: content["key"]}
            run_id = self.client.create_run(experiment_id, entry.time, tags, content["run_name"]).info.run_id
        self.sent.run_id, self.sent.experiment_id = run_id, experiment_id
        note_tracked(self.folder, run_id, experiment_id)

    def _find_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name)
            except MlflowException:  # another run has just created it, or an answer was lost
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def _find_runs(self, experiment_id: str, key: str) -> list[str]:
        found = self.client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'")
        return sorted(run.info.run_id for run in found)

    def _end(self, key: str, status: str, time: int) -> None:
        assert self.sent.run_id is not None  # the journal begins with `begin`
        assert self.sent.experiment_id is not None
        self.client.set_terminated(self.sent.run_id, status, time)
        # A server that hung may have created the run after it was given up and looked for again: empty, and not ours.
        for run_id in self._find_runs(self.sent.experiment_id, key):
            if run_id != self.sent.run_id:
                self.client.delete_run(run_id)

    def _set_tag(self, tags: Sequence[Any]) -> None:
        self.client.set_tag(self.sent.run_id, *tags[0], synchronous=True)

    def _log_metrics(self, batch: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        points = iter(
            Metric(name, float(value), entry.time, entry.content["step"])
            for entry in batch
            for name, value in entry.content["values"].items()
        )
        while part := list(islice(points, _MOST_METRICS)):
            self._offer(part, lambda metrics: self._log_batch(metrics=metrics))

    def _log_parameters(self, values: dict[str, str]) -> None:
        from mlflow.entities import Param

        known = self.client.get_run(self.sent.run_id).data.params  # a resumed run has them, and they cannot change
        parameters = iter(Param(name, value) for name, value in values.items() if name not in known)
        while part := list(islice(parameters, _MOST_PARAMETERS)):
            self._offer(part, lambda params: self._log_batch(params=params))

    def _log_batch(self, **entities: Sequence[Any]) -> None:
        # The environment may ask MLflow to answer before it has sent.
        self.client.log_batch(self.sent.run_id, **entities, synchronous=True)

    def _log_inputs(self, contents: Sequence[dict[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", "training")]
        inputs = [DatasetInput(Dataset(source_type="local", **content["dataset"]), tags) for content in contents]
        self.client.log_inputs(self.sent.run_id, inputs)

    def _upload(self, content: dict[str, Any]) -> None:
        file = self.folder / content["file"]
        if not file.is_file():
            self.sent.refused.append(f"{content['file']}: the file is gone")
            return
        with speaking(_UPLOAD_SECONDS):
            self.client.log_artifact(self.sent.run_id, str(file), content["target"])

    def _offer(self, items: Sequence[Any], send: Callable[[Sequence[Any]], Any]) -> None:
        """Send items together; where the store refuses one of them, the others all the same."""
        try:
            send(items)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(items) == 1:
                self.sent.refused.append(str(error).strip().splitlines()[0])
                return
            half = len(items) // 2
            self._offer(items[:half], send)
            self._offer(items[half:], send)
