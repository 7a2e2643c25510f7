"""k-fold cross-validation: one run for each fold, and what all of them say together."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.errors import UserError
from pipeline.evaluation.metrics import Estimate
from pipeline.evaluation.predictions import SEPARATOR, Predictions, write_csv
from pipeline.exits import INTERRUPTED, TERMINATED, Terminated
from pipeline.outcome import Evaluated, write_summary
from pipeline.parsing import BESIDE_FIT, Parser
from pipeline.progress import say
from pipeline.runs import CONFIG, PREDICTIONS, RUNS, SPLIT, SUMMARY, new_run_name, read_identity, require_folder
from pipeline.tracking.logger import MLflowLogger

FOLDS = "folds.json"
_FOLDER = "run folder"


@dataclass
class Folds:
    """The state of a cross-validation, in its folder from the first moment.

    Attributes:
        folder: of the cross-validation.
        count: of folds.
        arguments: of ``fit``, the same for every fold.
        done: run folder of each finished fold, by its number from 1.
    """

    folder: Path
    count: int
    arguments: list[str]
    done: dict[int, str]

    @classmethod
    def read(cls, folder: Path) -> "Folds":
        """Of an earlier start.

        Raises:
            UserError: the folder holds no cross-validation.
        """
        try:
            content = json.loads((folder / FOLDS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"--go_on: expected the folder of a cross-validation, found no readable {FOLDS} in '{folder}'."
            ) from error
        done = {int(number): path for number, path in content["done"].items()}
        return cls(folder, content["count"], content["arguments"], done)

    def write(self) -> None:
        """Whole or not at all."""
        content = {"count": self.count, "arguments": self.arguments, "done": self.done}
        unfinished = self.folder / f"{FOLDS}.part"
        unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(self.folder / FOLDS)


def run_crossvalidate(arguments: Sequence[str]) -> int:
    """Run ``fit`` once for each fold, in processes of their own, and pool the predictions of their test parts.

    Together these are one prediction for every image, from a network that never saw it. A fold that is done is not run
    again.

    Args:
        arguments: of this command; those it does not know are passed on to ``fit``.

    Returns:
        The exit code.

    Raises:
        UserError: an argument is wrong, or a fold failed.
        KeyboardInterrupt: the person stopped it.
    """
    parser = Parser("crossvalidate", "Train once for each fold, and test on all images together.", BESIDE_FIT)
    parser.add_argument("--folds", type=int, default=5, help="number of parts, at least 2; default: 5")
    parser.add_argument("--go_on", metavar="FOLDER", help="folder of an interrupted cross-validation")
    own, others = parser.parse_known_args(arguments)
    if own.go_on is not None:
        if others:
            raise UserError(
                f"--go_on: expected no other setting (they are kept), found {' '.join(others)}; remove them."
            )
        folds = Folds.read(Path(own.go_on))
    else:
        if own.folds < 2:
            raise UserError(f"--folds: expected at least 2, found {own.folds}.")
        require_folder(RUNS)
        folds = Folds(RUNS / f"{new_run_name()}-folds", own.folds, others, {})
        _require_settings(folds.arguments)
        folds.folder.mkdir(parents=True)
        folds.write()
    for number in range(1, folds.count + 1):
        if number not in folds.done:
            say(f"\n===== fold {number} of {folds.count} =====\n")
            try:
                folds.done[number] = _run_fold(folds, number)
            except (KeyboardInterrupt, UserError):
                say(f"\nto go on      python -m pipeline crossvalidate --go_on {folds.folder}")
                raise
            folds.write()
    _pool(folds)
    return 0


def _require_settings(arguments: Sequence[str]) -> None:
    for name in ("--data.fold", "--data.init_args.fold", "--registered_model_name", "--ckpt_path"):
        if any(argument.split("=")[0] == name for argument in arguments):
            raise UserError(f"{name}: expected no value, found one; remove it: every fold is a new run of its own.")


def _run_fold(folds: Folds, number: int) -> str:
    """Its run folder."""
    command = [sys.executable, "-m", "pipeline", "fit", *folds.arguments]
    command += [f"--data.fold={number} of {folds.count}", "--registered_model_name=null"]
    folder = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith(_FOLDER):
                    folder = line.removeprefix(_FOLDER).strip()
        except KeyboardInterrupt as error:
            if isinstance(error, Terminated):
                process.terminate()
            process.wait()  # the same Ctrl-C reached it, and it ends in its own time
            raise
    if process.returncode in (INTERRUPTED, TERMINATED):
        raise KeyboardInterrupt if process.returncode == INTERRUPTED else Terminated
    if process.returncode != 0 or folder is None or not (Path(folder) / SUMMARY).is_file():
        raise UserError(
            f"expected fold {number} of {folds.count} to finish, found exit code {process.returncode}; see the message "
            "above."
        )
    return folder


def _pool(folds: Folds) -> None:
    """Evaluate all test parts as one, keep and track it."""
    runs = [Path(folds.done[number]) for number in sorted(folds.done)]
    summaries = [json.loads((run / SUMMARY).read_text(encoding="utf-8")) for run in runs]
    classes = summaries[0]["classes"]
    for run, summary in zip(runs, summaries, strict=True):
        if summary["classes"] != classes:
            raise UserError(
                f"expected the same classes in every fold, found {summary['classes']} in {run} and {classes} in "
                f"{runs[0]}; a rare class is missing from the training images of a fold: use fewer folds."
            )
    paths, predictions, groups = _read_predictions(runs, classes, summaries[0]["multi_label"])
    pooled = Evaluated("test", paths, predictions, groups)
    write_csv(folds.folder / PREDICTIONS, paths, predictions, classes)
    summary = {
        "folds": [str(run) for run in runs],
        "classes": classes,
        "metrics": {name: estimate.to_dict() for name, estimate in pooled.prefixed().items()},
        "by_fold": {
            name: [summary["metrics"][name]["value"] for summary in summaries] for name in sorted(pooled.prefixed())
        },
    }
    write_summary(folds.folder, summary)
    _track(folds, runs[0], pooled.prefixed())
    pooled.say(f"all {folds.count} folds together, each predicted by a network that did not see it")
    say("\nby fold")
    for name, values in summary["by_fold"].items():
        spread = f"mean {np.mean(values):.4f}, standard deviation {np.std(values, ddof=1):.4f}"
        say(f"  {name:<18} {'  '.join(f'{value:.4f}' for value in values)}   {spread}")
    say(f"\nfolder        {folds.folder}")


def _read_predictions(
    runs: Sequence[Path], classes: list[str], multi_label: bool
) -> tuple[list[str], Predictions, list[str] | None]:
    paths: list[str] = []
    targets: list[Any] = []
    probabilities: list[list[float]] = []
    groups: dict[str, str] = {}
    for run in runs:
        with (run / SPLIT).open(newline="", encoding="utf-8") as file:
            groups |= {row["path"]: row["group"] for row in csv.DictReader(file) if "group" in row}
        with (run / PREDICTIONS).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                paths.append(row["path"])
                present = set(row["target"].split(SEPARATOR))
                targets.append([name in present for name in classes] if multi_label else classes.index(row["target"]))
                probabilities.append([float(row[f"p_{name}"]) for name in classes])
    predictions = Predictions(np.array(targets, dtype=np.int64), np.array(probabilities), multi_label)
    return paths, predictions, [groups[path] for path in paths] if groups else None


def _track(folds: Folds, first: Path, metrics: dict[str, Estimate]) -> None:
    """A tracked run for the whole, beside those of the folds; none where these were not tracked."""
    tracked = read_identity(first)
    if "tracking_uri" not in tracked:
        return
    settings = yaml.safe_load((first / CONFIG).read_text(encoding="utf-8"))["logger"]
    logger = MLflowLogger(settings["experiment_name"], tracked["tracking_uri"], folder=folds.folder)
    with logger.closing():
        logger.log_metrics({name: estimate.value for name, estimate in metrics.items()})
        for name, estimate in metrics.items():
            logger.log_metrics(estimate.bounds(f"intervals/{name.replace('/', '_')}"))
        logger.set_tags({f"fold_{number}": folder for number, folder in sorted(folds.done.items())})
        for name in (SUMMARY, PREDICTIONS):
            logger.log_file(folds.folder / name)
