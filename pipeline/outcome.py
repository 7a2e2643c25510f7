"""What a finished training leaves behind: files, the tracked run, the registered model, and a few lines to read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.evaluation.calibration import tempered
from pipeline.evaluation.familiarity import STRANGE
from pipeline.evaluation.figures import confusion_figure, presence_figure
from pipeline.evaluation.metrics import Estimate, confusion_matrix, estimate_metrics, units_of
from pipeline.evaluation.predictions import Predictions, write_csv
from pipeline.progress import say
from pipeline.runs import CONFIG, PREDICTIONS, SPLIT, SUMMARY, write_json
from pipeline.tracking.logger import MLflowLogger
from pipeline.tracking.store import without_password

_NAMES = {"accuracy": "accuracy", "macro_f1": "macro F1", "log_loss": "log loss", "mean_average_precision": "mean AP"}


@dataclass(frozen=True)
class Evaluated:
    """A split with its predictions and metrics.

    Attributes:
        split: ``val``, ``test`` or :data:`~pipeline.evaluation.metrics.OUT_OF_FOLD`.
        paths: of its images, in order.
        predictions: in the same order.
        groups: of its images; None: there are none.
    """

    split: str
    paths: list[str]
    predictions: Predictions
    groups: Sequence[str] | None = None

    @cached_property
    def metrics(self) -> dict[str, Estimate]:
        """By name, such as ``accuracy``; with intervals over groups, where there are any."""
        return estimate_metrics(self.predictions, self.groups)

    def tempered(self, temperature: float) -> "Evaluated":
        """The same under a temperature."""
        return replace(self, predictions=tempered(self.predictions, temperature))

    def prefixed(self) -> dict[str, Estimate]:
        """Metrics by full name, such as ``test/accuracy``."""
        return {f"{self.split}/{name}": estimate for name, estimate in self.metrics.items()}

    @property
    def _is_one_group(self) -> bool:
        return len(self.paths) > 1 and units_of(len(self.paths), self.groups).max() == 0

    def say(self, model: str) -> None:
        """Print the metrics as a short table.

        Args:
            model: what was evaluated, in a few words.
        """
        alone = ", all of one group, which says nothing of others" if self._is_one_group else ""
        say(f"\n{self.split.replace('_', ' ')}: {len(self.paths):,} images{alone}, {model}")
        for name, estimate in self.metrics.items():
            say(f"  {_NAMES[name]:<9} {estimate.value:.4f}   95 % interval {estimate.low:.4f} to {estimate.high:.4f}")
        familiarity = self.predictions.familiarity
        if familiarity is not None and self.split == "test":  # validation images are what it is measured by
            strange = int((familiarity < STRANGE).sum())
            say(
                f"  strange   {strange / len(familiarity):.4f}   {strange:,} look less like the training images than "
                f"{1 - STRANGE:.0%} of those held out do"
            )


def write_predictions(folder: Path, test: Evaluated, classes: Sequence[str]) -> None:
    """``predictions.csv``: the test split, image by image."""
    write_csv(folder / PREDICTIONS, test.paths, test.predictions, classes)


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """``summary.json``, which marks the run as done."""
    write_json(folder / SUMMARY, summary)


def track_outcome(
    logger: MLflowLogger,
    folder: Path,
    checkpoint: Path,
    classes: Sequence[str],
    test: Evaluated,
    metrics: dict[str, Estimate],
) -> None:
    """Put metrics with intervals, files, the best checkpoint and a figure into the tracked run."""
    values: dict[str, float] = {}
    for name, estimate in metrics.items():
        split, _, metric = name.partition("/")
        # `val/...` are the curves of the training; bounds stand apart, so that the page shows values first.
        values[name if split == "test" else f"best/{split}_{metric}"] = estimate.value
        values |= estimate.bounds(f"intervals/{split}_{metric}")
    logger.log_metrics(values)
    predictions, metric = test.predictions, "macro_f1" if test.predictions.multi_label else "accuracy"
    title = f"test, {len(test.paths):,} images, {_NAMES[metric]} {test.metrics[metric].value:.3f}"
    if predictions.multi_label:
        logger.log_figure(presence_figure(predictions.targets, predictions.labels, classes, title), "classes.png")
    else:
        counts = confusion_matrix(predictions.targets, predictions.labels, len(classes))
        logger.log_figure(confusion_figure(counts, classes, title), "confusion_matrix.png")
    columns = ("value", "low", "high", "n")
    rows = [[name, *(estimate.to_dict()[column] for column in columns)] for name, estimate in metrics.items()]
    logger.log_table(["metric", *columns], rows, "metrics.json")
    for name in (SPLIT, PREDICTIONS):
        logger.log_file(folder / name)
    logger.log_file(checkpoint, "checkpoints")


def say_next(folder: Path, checkpoint: Path, logger: MLflowLogger | None, registered: dict[str, str] | None) -> None:
    """Print where things are and the commands that follow."""
    say(f"\nrun folder    {folder}")
    if logger is not None:
        say(f"tracked in    {without_password(logger.tracking_uri)}  (run {logger.run_id or 'not there yet'})")
    if registered is not None:
        say(f"registered    models:/{registered['name']}@challenger  (version {registered['version']})")
    config, best = folder / CONFIG, folder / checkpoint.name
    say("\nnext:")
    if logger is not None:
        for line in logger.where_to_look():
            say(f"  {line}")
    say(f"  python -m pipeline test --config {config} --ckpt_path {best}")
    say(f"  python -m pipeline predict --config {config} --ckpt_path {best} --data.predict_path <folder of images>")
    if registered is not None and logger is not None:
        uri = without_password(logger.tracking_uri)
        say(f"  python -m pipeline promote --name {registered['name']} --tracking_uri {uri}")
