"""Scoring many images at once with a registered model, over Ray Data."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from datamodules.decode import read_file
from pipeline.errors import UserError
from pipeline.registry.loading import load, pin
from pipeline.scoring.answers import answer_schema

if TYPE_CHECKING:
    from ray.data import Dataset

_IMAGE, _PATH = "image", "path"
# What kills its worker every time, such as an image that takes more memory than there is, must come to an end.
_TRIES_AGAIN = 3
_ROWS_PER_FILE = 10_000


def score(
    address: str,
    source: str | Path,
    target: str | Path,
    *,
    root: str | Path = ".",
    workers: int = 2,
    batch_size: int = 64,
    tracking_uri: str | None = None,
) -> None:
    """Score the images of a Parquet table with a registered model, and write a table of answers.

    It runs on the Ray cluster that the process is connected to, or that ``RAY_ADDRESS`` names; otherwise on this
    machine. On several machines, ``tracking_uri`` is a server's, and all of them see the folders. An alias is looked up
    once, so that all answers come from one version. The images pass in batches; neither they nor the answers are all in
    memory at any time. What a worker that dies was at is done again, three times at most.

    Args:
        address: ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.
        source: a Parquet file, a folder of them, or an address that Ray reads. It has encoded images in a binary column
            ``image``, or files in a string column ``path``; where it has both, ``image`` counts.
        target: a folder, new or empty. It has the answers when all went well, and nothing otherwise.
        root: where relative paths begin.
        workers: processes that score, each with a copy of the model, on one core.
        batch_size: images that a worker has in memory at once.
        tracking_uri: of the registry; None: where runs are tracked.

    The answers are in no particular order and have all columns of the source but ``image``; ``label``, ``label_id``,
    ``score`` and ``probabilities`` (``labels`` and ``probabilities`` where an image may have several classes); and
    ``error``, why an image could not be read and has no answer.

    Raises:
        UserError: Ray is not installed; there is no such model, source or column; the target is not empty.
    """
    ray = _ray()
    target = Path(target).resolve()
    _require_empty(target)
    pinned, uri = pin(address, tracking_uri, "address")
    # What is wrong with the model is said here, before any worker starts.
    answers = answer_schema(load(pinned, uri).bundle.multi_label)
    try:
        images = ray.data.read_parquet(str(source), num_cpus=0, concurrency=workers)
    except FileNotFoundError as error:
        raise UserError(f"source: expected a Parquet file or a folder of them, found none at '{source}'.") from error
    column = _image_column(images, answers)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        written = Path(scratch) / target.name
        written.mkdir()
        # By itself Ray hands out many megabytes at a time: a long list of paths to one worker alone.
        images.repartition(target_num_rows_per_block=batch_size).map_batches(
            Worker,
            fn_constructor_args=(pinned, uri, column, Path(root).resolve()),
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            # Ray sets OMP_NUM_THREADS, to which the model keeps, to 1 in either case. Ray's own listing of files waits
            # for a whole core, forever where the workers count for all of them.
            num_cpus=1 if workers < ray.cluster_resources().get("CPU", 0) else 0,
            max_task_retries=_TRIES_AGAIN,
        ).write_parquet(
            str(written), min_rows_per_file=_ROWS_PER_FILE, concurrency=workers, ray_remote_args={"num_cpus": 0}
        )
        os.replace(written, target)


class Worker:
    """Scores batches of rows; Ray makes one in each process.

    Args:
        address: ``models:/<name>/<version>``.
        tracking_uri: absolute, of the registry.
        column: that has the images, ``image`` or ``path``.
        root: where relative paths begin.
    """

    def __init__(self, address: str, tracking_uri: str, column: str, root: Path) -> None:
        self._model = load(address, tracking_uri)
        self._column = column
        self._root = root

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The rows without ``image``, with their answers."""
        images, unread = [], {}
        for number, value in enumerate(rows[self._column].to_pylist()):
            try:
                images.append(self._content(value))
            except (OSError, ValueError) as error:  # ValueError: null, or what no file can be called
                images.append(b"")
                unread[number] = f"{self._column}: {error}"
        answers = self._model.predict_each(images)
        answers["error"] = [unread.get(number, reason) for number, reason in enumerate(answers["error"])]
        if self._column == _IMAGE:
            rows = rows.drop_columns([_IMAGE])
        for field in answer_schema(self._model.bundle.multi_label):
            said = answers.get(field.name)  # not every model knows what is familiar
            column = pa.nulls(len(rows), field.type) if said is None else pa.array(said, field.type, from_pandas=True)
            rows = rows.append_column(field, column)
        return rows

    def _content(self, value: Any) -> Any:
        if value is None:
            raise ValueError("expected one, found null")
        return value if self._column == _IMAGE else read_file(self._root / value)


def _ray() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise UserError(
            'scoring: expected the installed package ray, found none; pip install "transfer-pipeline[ray]".'
        ) from error
    return ray


def _require_empty(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"target: expected a new or empty folder, found a file at '{target}'; choose another.")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"target: expected a new or empty folder, found files in '{target}'; choose another.")


def _image_column(images: "Dataset", answers: pa.Schema) -> str:
    """The column that has the images, where no column stands in the way of the answers."""
    schema = images.schema()
    columns = dict(zip(schema.names, schema.types, strict=True))
    taken = sorted(set(columns) & set(answers.names))
    if taken:
        raise UserError(
            f"source: expected no columns called as the answers are, found {', '.join(taken)}; give them other names."
        )
    for name, kinds in ((_IMAGE, (pa.binary(), pa.large_binary())), (_PATH, (pa.string(), pa.large_string()))):
        if columns.get(name) in kinds:
            return name
    found = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"
    raise UserError(
        f"source: expected a column {_IMAGE} of encoded bytes (binary) or {_PATH} of files (string), found {found}."
    )
