"""Run folders: where a run keeps its files, and finding the one to go on with."""

import csv
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from pipeline.errors import UserError

RUNS = Path("runs")
BEST = "best.ckpt"
LAST = "last.ckpt"
START = "start.safetensors"  # while the run goes on
CONFIG = "config.yaml"
PLAN = "plan.json"
PLANNED = "plan"  # the same in a checkpoint
SPLIT = "split.csv"
PREDICTIONS = "predictions.csv"
SUMMARY = "summary.json"
_IDENTITY = "run.json"  # present from the first moment; summary.json only when the run is done


def new_run_name() -> str:
    """``<UTC time>-<short id>``; the id is not seeded, so that equal runs get different folders."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def require_folder(runs: Path) -> None:
    """Refuse where run folders cannot be made.

    Raises:
        UserError: something else has the name, or the folder cannot be written.
    """
    place = runs if runs.exists() else runs.absolute().parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            f"expected to keep the run in the folder '{runs.absolute()}', found that it cannot be written; start from "
            "another working folder."
        )


def config_digest(config: str) -> str:
    """Digest of a configuration in YAML; the checkpoint to resume from and the amount of output do not count."""
    content = yaml.safe_load(config)
    for key in ("ckpt_path", "quiet", "output"):
        content.pop(key, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class RunFolder(Callback):
    """Makes a run's folder when training starts, with the configuration and the split in it.

    Args:
        path: of the folder.
        asked: the configuration in YAML as it was given, by which the run is found again.
        config: the same with everything in it that was chosen.
        plan: what was chosen and why, in JSON.
        split: a manifest of the images: path, label, split and more, one a row.
    """

    def __init__(self, path: Path, asked: str, config: str, plan: str, split: Sequence[dict[str, str]]) -> None:
        self.path = path
        self.asked = asked
        self.config = config
        self.plan = plan
        self.split = split

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Every process makes up a name; the first one's counts.
        self.path = trainer.strategy.broadcast(self.path)
        if trainer.is_global_zero:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / CONFIG).write_text(self.config, encoding="utf-8")
            (self.path / PLAN).write_text(self.plan + "\n", encoding="utf-8")
            with (self.path / SPLIT).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(self.split[0]))
                writer.writeheader()
                writer.writerows(self.split)
            self.write_identity({})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[PLANNED] = self.plan  # checkpoints are moved, and fetched from elsewhere

    def write_identity(self, tracking: dict[str, Any]) -> None:
        """Note which tracked run this folder belongs to.

        Args:
            tracking: ``run_id``, ``experiment_id`` and ``tracking_uri``; empty where the run is not tracked. The first
                two are None until the tracking server has answered (see :func:`note_tracked`).
        """
        write_json(self.path / _IDENTITY, {**tracking, "config_digest": config_digest(self.asked)})


def write_json(file: Path, content: dict[str, Any]) -> None:
    """A file that appears whole or not at all."""
    unfinished = file.with_name(f"{file.name}.part")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(file)


def note_tracked(folder: Path, run_id: str, experiment_id: str) -> None:
    """Fill in which tracked run a folder belongs to, once that is known, in each file that says so.

    Args:
        folder: of the run.
        run_id: of the tracked run.
        experiment_id: likewise.
    """
    known = {"run_id": run_id, "experiment_id": experiment_id}
    for file in (folder / _IDENTITY, folder / SUMMARY):
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if "run_id" in content and {**content, **known} != content:
            write_json(file, {**content, **known})


def read_identity(folder: Path) -> dict[str, Any]:
    """What :meth:`RunFolder.write_identity` noted in a run folder.

    Raises:
        OSError: it is none.
    """
    return json.loads((folder / _IDENTITY).read_text(encoding="utf-8"))


def find_resumable(config: str, runs: Path = RUNS) -> tuple[Path, dict[str, Any]]:
    """The newest unfinished run with this configuration.

    Args:
        config: the configuration in YAML, as it is given.
        runs: folder of run folders.

    Returns:
        Its folder, and what :meth:`RunFolder.write_identity` noted.

    Raises:
        UserError: there is none.
    """
    digest = config_digest(config)
    finished = others = 0
    for folder, identity in _newest_first(runs):
        if identity["config_digest"] != digest:
            others += 1
        elif (folder / SUMMARY).is_file():
            finished += 1
        elif (folder / LAST).is_file():
            return folder, identity
    raise UserError(
        f"--ckpt_path last: expected an unfinished run with this configuration and a {LAST} below '{runs}', found none "
        f"({finished} with this configuration are finished, {others} have another one); give the path of a checkpoint, "
        "or leave --ckpt_path out to start anew."
    )


def newest_checkpoint(runs: Path = RUNS) -> Path | None:
    """The best checkpoint of the newest run that has one."""
    return next((path / BEST for path, _ in _newest_first(runs) if (path / BEST).is_file()), None)


def _newest_first(runs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for note in sorted(runs.glob(f"*/{_IDENTITY}"), reverse=True):
        yield note.parent, read_identity(note.parent)
