"""``python -m pipeline register``: from a run that is done to a version in the model registry."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules import ImageDataModule
from pipeline.checkpoints import existing_checkpoint
from pipeline.errors import UserError
from pipeline.exits import SUCCESS
from pipeline.fitting import evaluate
from pipeline.outcome import Evaluated
from pipeline.parsing import Parser
from pipeline.progress import say
from pipeline.registry.register import Candidate, register, require_threshold
from pipeline.registry.runs import fetch_run, run_tags
from pipeline.runs import CONFIG, config_digest, read_identity
from pipeline.settings import require_model_name
from pipeline.task import ClassificationTask
from pipeline.tracking.store import without_password
from pipeline.transfer_cli import TransferCLI

_BESIDE_TEST = "Every setting of test may stand beside these, as where the images are now: --data.root FOLDER, ..."


@dataclass(frozen=True)
class _Run:
    """A run whose model is to be registered: where it is tracked, and its files."""

    tracking_uri: str
    run_id: str
    config: Path
    checkpoint: Path


class _TestCLI(TransferCLI):
    """``test`` that keeps what it finds."""

    evaluated: Evaluated

    def test(self, model: ClassificationTask, datamodule: ImageDataModule, **_: Any) -> None:
        assert self.checkpoint is not None
        self.evaluated = evaluate(self.trainer, "test", model, datamodule, self.checkpoint, self.collector)


def run_register(arguments: Sequence[str], terminal: bool, started: float) -> int:
    """Test a run's checkpoint, and register it as the challenger once the registered version repeats the test.

    Args:
        arguments: of this command; those it does not know are settings of ``test``.
        terminal: whether a person is looking.
        started: ``time.perf_counter()`` when the program started.

    Returns:
        The exit code.

    Raises:
        UserError: an argument is wrong, or the run was not tracked.
        DataError: the data is not as described.
        RuntimeError: the registered version answers otherwise than in its test; none is left behind.
    """
    parser = Parser("register", "Register a run's best checkpoint as the challenger.", _BESIDE_TEST)
    parser.add_argument("--name", required=True, help="of the registered model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="ID", help="of the tracked run; its files are fetched from there")
    source.add_argument("--checkpoint", metavar="FILE", help="of a run folder, such as runs/<run>/best.ckpt")
    parser.add_argument("--tracking_uri", help="--run: the store; default: MLFLOW_TRACKING_URI, else mlflow.db here")
    parser.add_argument("--threshold", type=float, help="score below which the model gives no label; default: none")
    own, others = parser.parse_known_args(arguments)
    require_model_name("--name", own.name)
    require_threshold(own.threshold, multi_label=False)
    with tempfile.TemporaryDirectory() as scratch:
        if own.run is not None:
            run = _Run(*fetch_run(own.run, own.tracking_uri, Path(scratch)))
        else:
            run = _beside(existing_checkpoint(own.checkpoint, flag="--checkpoint"))
        test = ["test", "--config", str(run.config), "--ckpt_path", str(run.checkpoint), *others]
        cli = _TestCLI(test, terminal, started)
        evaluated = cli.evaluated
        evaluated.say(f"checkpoint {own.checkpoint or f'of run {own.run}'}")
        candidate = Candidate(
            cli.model,
            cli.datamodule,
            evaluated.predictions,
            evaluated.prefixed(),
            run_tags(run.run_id, run.tracking_uri),
            config_digest(run.config.read_text(encoding="utf-8")),
            own.threshold,
        )
        version = register(own.name, candidate, run.tracking_uri, run.run_id)
    say(f"\nregistered    models:/{own.name}@challenger  (version {version}); it repeated the whole test by itself")
    shown = without_password(run.tracking_uri)
    say(f"tracked in    {shown}  (run {run.run_id})")
    say(f"\nnext:\n  python -m pipeline promote --name {own.name} --tracking_uri {shown}")
    return SUCCESS


def _beside(checkpoint: Path) -> _Run:
    """The run that a checkpoint lies in the folder of."""
    try:
        identity = read_identity(checkpoint.parent)
        tracking_uri, run_id = identity["tracking_uri"], identity["run_id"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"--checkpoint: expected a checkpoint in the folder of a tracked run, found no such run beside "
            f"'{checkpoint}'; a version belongs to a run: fit without trainer.logger set."
        ) from error
    if run_id is None:
        raise UserError(
            f"--checkpoint: expected a run that its tracking server has, found that it was not taken by "
            f"{without_password(tracking_uri)} yet; run `python -m pipeline sync {checkpoint.parent}` first."
        )
    return _Run(tracking_uri, run_id, checkpoint.parent / CONFIG, checkpoint)
