"""One ``fit`` from start to end: train, evaluate the best checkpoint, keep and register what came out."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import ImageDataModule
from pipeline.checkpoints import CALIBRATED, calibrate_checkpoint, read_checkpoint, require_finite
from pipeline.evaluation.calibration import fit_temperature
from pipeline.evaluation.metrics import OUT_OF_FOLD
from pipeline.evaluation.predictions import PredictionCollector
from pipeline.finetuning.head_alone import HeadAlone
from pipeline.finetuning.interpolation import USUAL_TEMPERATURE, StartingPoint
from pipeline.finishing import answers_out_of_fold, interpolated_checkpoint, measure_familiarity, settled_checkpoint
from pipeline.monitor import MONITORS
from pipeline.outcome import Evaluated, say_next, track_outcome, write_predictions, write_summary
from pipeline.progress import EpochLines, say
from pipeline.registry.register import Candidate, StoreAwayError, register
from pipeline.resumption import LastCheckpoint, Patience
from pipeline.runs import BEST, CONFIG, LAST, START, SUMMARY, RunFolder, config_digest
from pipeline.task import FAMILIARITY, ClassificationTask
from pipeline.tracking.logger import MLflowLogger
from pipeline.tracking.recorder import DataFacts, RunRecorder
from pipeline.tracking.store import without_password
from pipeline.tracking.system_metrics import SystemMetrics

_PATIENCE = 30.0  # seconds that a tracking server which is away has to come back before a model is registered


def interruptible(trainer: Trainer, stage: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Run a stage of the trainer; an interruption leaves as the ``KeyboardInterrupt`` that it was.

    Lightning turns it into ``SystemExit(1)``, which cannot be told from a failure.
    """
    try:
        stage(*args, **kwargs)
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        # What the trainer was handling when it gave up says whether it was Ctrl-C or SIGTERM.
        cause = error.__context__
        raise (cause if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt()) from None


def evaluate(
    trainer: Trainer,
    split: str,
    task: ClassificationTask,
    data: ImageDataModule,
    checkpoint: Path,
    collector: PredictionCollector,
) -> Evaluated:
    """Metrics of a checkpoint on ``val`` or ``test``; the collector is one of the trainer's callbacks."""
    stage = trainer.validate if split == "val" else trainer.test
    # The curves of the training would get a point more; what comes out here is tracked with its intervals.
    loggers, trainer.loggers = trainer.loggers, []
    try:
        interruptible(trainer, stage, task, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    finally:
        trainer.loggers = loggers
    assert collector.collected is not None
    images = data.images(split)
    return Evaluated(split, images.paths, collector.collected, images.groups)


@dataclass
class Fitting:
    """What a ``fit`` needs beside the trainer.

    Attributes:
        folder: of the run.
        monitor: the metric that picks the best checkpoint.
        patience: epochs without a better one before training stops; None: it never does.
        logger: of the tracked run, or None.
        registered_model_name: of the model in the registry, or None.
        tags: of the run.
        data_facts: what is told of the data.
        started: ``time.perf_counter()`` when the program started.
        interpolates: whether the best checkpoint is chosen between the start and the end of the training, and not
            among its epochs.
        settles: whether an epoch before the last one has to be better by more than chance to be the best checkpoint
            (:func:`~pipeline.finishing.settled_checkpoint`).
        validates: whether there are images to choose and to calibrate by.
        probe: the strategy, where it solves the head and leaves the backbone as it is.
        resumes: whether the run was begun before.
    """

    folder: RunFolder
    monitor: str
    patience: int | None
    logger: MLflowLogger | None
    registered_model_name: str | None
    tags: dict[str, str]
    data_facts: DataFacts
    started: float
    interpolates: bool = False
    settles: bool = False
    validates: bool = True
    probe: HeadAlone | None = None
    resumes: bool = False

    def __post_init__(self) -> None:
        self.collector = PredictionCollector()
        self.best = ModelCheckpoint(
            dirpath=self.folder.path.resolve(),
            filename=Path(BEST).stem,
            monitor=self.monitor,
            mode=MONITORS[self.monitor],
            enable_version_counter=False,
        )
        self.last = LastCheckpoint(self.folder)
        self.start = StartingPoint(lambda: self.folder.path / START)
        self.epochs = EpochLines(self.best if self.validates and not self.interpolates else None)

    @property
    def callbacks(self) -> list[Callback]:
        """Callbacks for the trainer, in order."""
        callbacks: list[Callback] = [self.folder]
        if self.logger is not None:
            callbacks.append(RunRecorder(self.logger, self.folder, self.data_facts, self.tags))
            callbacks.append(SystemMetrics(self.logger))
        if self.patience is not None:
            callbacks.append(Patience(self.monitor, MONITORS[self.monitor], self.patience, self.resumes))
        callbacks += [self.collector, self.epochs]
        if self.interpolates:
            callbacks.append(self.start)
        elif self.validates:
            callbacks.append(self.best)
        return [*callbacks, self.last]

    def run(self, trainer: Trainer, task: ClassificationTask, data: ImageDataModule, checkpoint: Path | None) -> None:
        """Do it.

        Args:
            trainer: made with :attr:`callbacks`.
            task: to train.
            data: to train, validate and test on.
            checkpoint: to go on from, or None.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM stopped it; the run folder has ``last.ckpt``, the run ends as KILLED.
        """
        with self.logger.closing() if self.logger is not None else contextlib.nullcontext():
            try:
                self._fit(trainer, task, data, checkpoint)
            except KeyboardInterrupt:
                if (self.folder.path / LAST).is_file():
                    say(f"\nrun folder    {self.folder.path}\nto go on      the same command with --ckpt_path last")
                raise
            best, how = self._choose(trainer, task, data)
            require_finite(best)
            judged = self._calibrate(trainer, task, data, best)
            test = evaluate(trainer, "test", task, data, best, self.collector)
            registered = None
            if trainer.is_global_zero:
                registered = self._conclude(task, data, best, how, judged, test)
                self.start.file.unlink(missing_ok=True)
        if trainer.is_global_zero:  # now the store has the whole run, or it has been said that it has not
            say_next(self.folder.path, best, self.logger, registered)

    def _fit(self, trainer: Trainer, task: ClassificationTask, data: ImageDataModule, checkpoint: Path | None) -> None:
        try:
            interruptible(trainer, trainer.fit, task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except RuntimeError as error:
            if self.last.asked is None:
                raise
            # A signal to all processes of the run has ended those that read images before this one could stop.
            raise self.last.asked from error

    def _choose(self, trainer: Trainer, task: ClassificationTask, data: ImageDataModule) -> tuple[Path, str]:
        """The best checkpoint, and in words how it was chosen."""
        if self.interpolates:
            best, share = interpolated_checkpoint(trainer, task, data, self.folder.path, self.start, self.validates)
            why = "chosen by log loss here" if self.validates else "as usual"
            return best, f"{share:.0%} of the way from the solved head to the last epoch, {why}"
        if self.best.best_model_path and self.settles:
            best, passed_over = settled_checkpoint(trainer, task, data, self.folder.path)
            if passed_over is not None:
                return best, f"last epoch (epoch {passed_over} has the best {self.monitor}, within chance)"
        if self.best.best_model_path:
            return Path(self.best.best_model_path), f"best checkpoint by {self.monitor}"
        # A strategy that takes no steps leaves one network, and no epoch to choose; and without validation images there
        # is nothing to choose by.
        best = self.folder.path.resolve() / BEST
        trainer.save_checkpoint(best)
        return best, "the last checkpoint"

    def _calibrate(
        self, trainer: Trainer, task: ClassificationTask, data: ImageDataModule, best: Path
    ) -> Evaluated | None:
        """Fit the temperature of the best checkpoint, and measure what is familiar, once.

        Returns:
            What is said under that temperature of validation images or, without them, of training images by heads that
            have not seen them. Without either the temperature is the one that is usual.
        """
        # By this run, before it was interrupted. Asked before the evaluation, which all processes leave together: after
        # it, the first one writes.
        calibrated = read_checkpoint(best).get(CALIBRATED, False)
        judged: Evaluated | None
        if self.validates:
            judged = evaluate(trainer, "val", task, data, best, self.collector)
            if calibrated:
                return judged
        else:
            judged = self._judge_out_of_fold(trainer, task, data)
        if judged is None:
            temperature = USUAL_TEMPERATURE if self.interpolates else 1.0
        else:
            temperature = fit_temperature(judged.predictions)
        if trainer.is_global_zero and not calibrated:
            familiarity = measure_familiarity(trainer, task, data, self.probe)
            measured = {} if familiarity is None else {FAMILIARITY: familiarity.to_state()}
            calibrate_checkpoint(best, temperature, measured)
        trainer.strategy.barrier()
        return None if judged is None else judged.tempered(temperature)

    def _judge_out_of_fold(self, trainer: Trainer, task: ClassificationTask, data: ImageDataModule) -> Evaluated | None:
        """What the first process says of training images by heads that have not seen them, where there are such."""
        if self.probe is None or not trainer.is_global_zero:
            return None
        found = answers_out_of_fold(trainer, task, data, self.probe)
        if found is None:
            return None
        rows, predictions = found
        images = data.images("train").at(rows)
        return Evaluated(OUT_OF_FOLD, images.paths, predictions, images.groups)

    def _conclude(
        self,
        task: ClassificationTask,
        data: ImageDataModule,
        best: Path,
        how: str,
        judged: Evaluated | None,
        test: Evaluated,
    ) -> dict[str, str] | None:
        """Keep, track, register and print what came out; the registered model, if there is one."""
        folder, logger = self.folder.path, self.logger
        metrics = {**({} if judged is None else judged.prefixed()), **test.prefixed()}
        write_predictions(folder, test, task.classes)
        if logger is not None:
            track_outcome(logger, folder, best, task.classes, test, metrics)
        summary = {
            "run_id": logger.run_id if logger else None,
            "experiment_id": logger.experiment_id if logger else None,
            "tracking_uri": without_password(logger.tracking_uri) if logger else None,
            "run_dir": str(folder.resolve()),
            "checkpoint": str(best),
            "classes": task.classes,
            "multi_label": test.predictions.multi_label,
            "chosen": how,
            "temperature": round(float(task.temperature), 4),
            "metrics": {name: estimate.to_dict() for name, estimate in metrics.items()},
            "wall_seconds": round(time.perf_counter() - self.started, 1),
            "images_per_second": round(self.epochs.images_per_second, 1),
            "registered": None,
            "skipped": {split: len(reasons) for split, reasons in data.skipped.items()},
            "tags": self.tags,
        }
        write_summary(folder, summary)
        tempered_at = f"temperature {summary['temperature']:.2f}"
        if judged is None:
            test.say(f"{how}; {tempered_at}")
        elif judged.split == OUT_OF_FOLD:
            others = len(data.images("train")) - len(judged.paths)
            left_out = f" ({others:,} more train, and are not judged)" if others else ""
            judged.say(f"each judged by a head that was solved without it{left_out}; {tempered_at}, fitted here")
            test.say(how)
        else:
            judged.say(f"{how}; {tempered_at}, fitted here")
            test.say("the same checkpoint")
        read = summary["images_per_second"]
        say(f"  in {summary['wall_seconds']:.0f} s" + (f"; training read {read:.0f} images/s" if read else ""))
        if logger is None:
            return None
        logger.log_file(folder / SUMMARY)
        if self.registered_model_name is None:
            return None
        # The run is done by now, whatever comes of this.
        config = config_digest((folder / CONFIG).read_text(encoding="utf-8"))
        candidate = Candidate(task, data, test.predictions, metrics, self.tags, config)
        registered = _register(self.registered_model_name, candidate, logger, best)
        if registered is not None:
            write_summary(folder, {**summary, "registered": registered})
            logger.log_file(folder / SUMMARY)
        return registered


def _register(name: str, candidate: Candidate, logger: MLflowLogger, checkpoint: Path) -> dict[str, str] | None:
    """The registered model and its version; None where the tracking server stays away, which is said."""
    try:
        if not logger.settle(_PATIENCE):  # the version will belong to the run, which must be there
            raise StoreAwayError(f"the tracking server does not take the run ({logger.failure or 'no answer'})")
        assert logger.run_id is not None  # the store has it
        return {"name": name, "version": register(name, candidate, logger.tracking_uri, logger.run_id)}
    except StoreAwayError as error:
        say(f"\nnot registered  {name}: {error}")
        say(f"to register it  python -m pipeline register --name {name} --checkpoint {checkpoint}")
        return None
