"""The Lightning command line of this project: its arguments, its links, and the trainer it makes."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng

from datamodules import ImageDataModule
from datamodules.preprocessing import Preprocessing
from datamodules.splits import SPLITS
from pipeline.arguments import add_arguments, add_seed
from pipeline.briefing import brief
from pipeline.errors import UserError
from pipeline.evaluation.predictions import PredictionCollector, write_csv
from pipeline.finetuning import Strategy
from pipeline.finetuning.head_alone import HeadAlone
from pipeline.finishing import saw_the_start
from pipeline.fitting import Fitting, evaluate, interruptible
from pipeline.monitor import choose_monitor
from pipeline.origin import Origin, origin_of_evaluation, origin_of_fit
from pipeline.planning.plan import Plan
from pipeline.planning.session import plan_fit, require_one_process
from pipeline.progress import LeftOutLine, Meter, ProgressBar, say, warn_scratch
from pipeline.provenance import code_revision
from pipeline.runs import PREDICTIONS, RUNS, RunFolder, new_run_name, require_folder
from pipeline.scoring.bulk import BulkScoring
from pipeline.settings import check_settings, refuse_following, says_what_to_choose_by
from pipeline.task import ClassificationTask
from pipeline.tracking.logger import MLflowLogger
from pipeline.tracking.recorder import DataFacts

CSV = ".csv"
_FILES = (".json", ".tsv", ".txt", ".xlsx")  # endings that no folder is given


class TransferCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` with one task and any of the datamodules.

    Args:
        args: the command line, without the program's name.
        terminal: whether a person is looking, and a progress bar makes sense.
        started: ``time.perf_counter()`` when the program started.
    """

    #: Whether the backbone is to be trained, however few images there are.
    trains = False
    #: Whether no other process makes the same plan for the same run.
    alone = False

    def __init__(self, args: Sequence[str], terminal: bool, started: float) -> None:
        self.started = started
        self.terminal = terminal
        self.args = list(args)
        self.origin = Origin()
        self.plan = Plan(())
        self._scratch = tempfile.TemporaryDirectory(prefix="transfer-pipeline-")
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            ClassificationTask,
            ImageDataModule,
            subclass_mode_data=True,
            save_config_callback=None,  # the run folder keeps the configuration, and tracking takes it from there
            parser_kwargs={"prog": "python -m pipeline", **strict, self.args[0]: strict},
            args=self.args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # the task's hyperparameters are plain and load without it
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is called: a parser for each takes a tenth of a second to build."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name == self.args[0]}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_seed(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_arguments(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        settings = self.config[self.config.subcommand]
        # LightningCLI would let a checkpoint override the configuration and the command line, silently; what a
        # checkpoint decides is written out in `before_instantiate_classes`.
        self.ckpt_path, settings.ckpt_path = settings.ckpt_path, None

    @property
    def settings(self) -> Any:
        """The configuration of the subcommand that runs."""
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        settings = self.settings
        files = {str(path): yaml.safe_load(path.get_content()) for path in settings.config or []}
        refuse_following(self.args, files)
        check_settings(settings)
        self.config_text = self._parser(self.subcommand).dump(settings)
        if self.subcommand == "fit":
            require_folder(RUNS)
            self.origin = origin_of_fit(settings, self.ckpt_path, self.config_text, Path(self._scratch.name))
            self.plan = self.make_plan()
            self.plan.apply(settings)
            self.origin.require_epochs_left(settings.trainer.max_epochs)
        else:
            self._require_output()
            self.origin = origin_of_evaluation(settings, self.ckpt_path, self.args)

    @property
    def checkpoint(self) -> Path | None:
        """That the run goes on from, or that is evaluated."""
        return self.origin.checkpoint

    def make_plan(self) -> Plan:
        """Choose what is open in the settings; a run that goes on keeps what was chosen for it."""
        kept = self.origin.plan_kept(self.settings)
        if kept is not None:
            return kept
        if self.settings.budget is not None and not self.alone:
            require_one_process(self.settings.trainer)
        # What is drawn here must not change what is drawn later: the same settings, written out, make the same run.
        with isolate_rng():
            made = self._parser("fit").instantiate_classes(self.settings)
            return plan_fit(self.settings, made.data, made.model, self.started, self.trains)

    def _require_output(self) -> None:
        """Settle where predictions go: a CSV file, or, of ``predict`` alone, a folder."""
        settings = self.settings
        if settings.output is None:
            if self.subcommand != "predict":
                return
            if Path(PREDICTIONS).exists():
                raise UserError(f"--output: expected the name of a new file, found {PREDICTIONS} here; name one.")
            settings.output = PREDICTIONS
        suffix = Path(settings.output).suffix.lower()
        if suffix != CSV and (self.subcommand != "predict" or suffix in _FILES):
            folder = ", or a folder, which is filled with Parquet," if self.subcommand == "predict" else ""
            raise UserError(f"--output: expected a file name that ends in {CSV}{folder} found '{settings.output}'.")
        if suffix != CSV and settings.data.init_args.predict_path is None:
            raise UserError(
                f"--output: expected data.predict_path for predictions in the folder '{settings.output}', found none; "
                f"name images, or a {CSV} file for those of the test split."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.subcommand]
        given = settings.trainer.callbacks or []
        user_callbacks: list[Callback] = given if isinstance(given, list) else [given]
        bar = self.terminal and not settings.quiet
        self.meter = self.datamodule.progress = Meter(bar and os.environ.get("LOCAL_RANK", "0") == "0")
        if self.subcommand == "fit":
            self.fitting = self._make_fitting()
            callbacks = [LeftOutLine(self.datamodule), *self.fitting.callbacks]
            if self.fitting.logger is not None:
                kwargs["logger"] = self.fitting.logger
        else:
            self.collector = PredictionCollector()
            callbacks = [LeftOutLine(self.datamodule), self.collector]
            kwargs["logger"] = False
        callbacks = [*user_callbacks, *callbacks, *([ProgressBar()] if bar else [])]
        return self.make_trainer(callbacks=callbacks, enable_progress_bar=bar, **kwargs)

    def make_trainer(self, **arguments: Any) -> Trainer:
        """The trainer that the settings ask for.

        Args:
            arguments: of the trainer, in place of the settings.

        Raises:
            UserError: the settings do not fit this machine or each other.
        """
        try:
            return super().instantiate_trainer(enable_model_summary=False, **arguments)
        except (MisconfigurationException, ValueError) as error:
            found = " ".join(str(error).split())
            raise UserError(
                f"trainer: expected settings that fit this machine and each other, found: {found}"
            ) from error

    def _make_fitting(self) -> Fitting:
        settings, data, task = self.config_init[self.subcommand], self.datamodule, self.model
        identity = self.origin.resumed or {}
        folder = self.checkpoint.parent if identity and self.checkpoint else RUNS / new_run_name()
        table = data.table
        self.monitor = choose_monitor(settings.monitor, table.counts("train"), data.multi_label)
        logger = None
        if settings.trainer.logger in (None, True):
            where = {
                **settings.logger,
                "tracking_uri": identity.get("tracking_uri", settings.logger.tracking_uri),
            }
            logger = MLflowLogger(**where, folder=folder)
        if settings.registered_model_name is not None and logger is None:
            raise UserError(
                f"registered_model_name: expected tracking for '{settings.registered_model_name}' to be registered in, "
                "found trainer.logger set; leave trainer.logger out."
            )
        if self.origin.lineage is not None:
            task.lineage = self.origin.lineage
        validates = self._require_validation()
        tags = {
            "backbone": task.hparams["backbone"],
            "weights": task.lineage.address,
            "weights_origin": task.lineage.origin,
            "weights_licence": task.lineage.licence_in_words,
            "finetuning": type(self.strategy).__name__,
            "imbalance": settings.imbalance,
            "monitor": self.monitor[0] if validates else "none",
            "data_digest": table.digest,
            "code_revision": code_revision(),
        }
        if self.origin.begins_from_checkpoint:
            tags["resumed_from"] = str(self.checkpoint)
        counts = {split: dict(table.counts(split)) for split in SPLITS}
        return Fitting(
            folder=RunFolder(
                folder,
                self.config_text,
                self.plan.written_into(self.config_text),
                self.plan.to_json(),
                table.named_rows(),
            ),
            monitor=self.monitor[0],
            patience=settings.patience,
            logger=logger,
            registered_model_name=settings.registered_model_name,
            tags=tags,
            data_facts=DataFacts(
                data.dataset_name, table.listing.storage.location, table.digest, counts, lambda: data.left_out
            ),
            started=self.started,
            interpolates=self._interpolates(folder, validates),
            settles=not says_what_to_choose_by(settings),
            validates=validates,
            probe=self.strategy if isinstance(self.strategy, HeadAlone) else None,
            resumes=bool(identity),
        )

    def _interpolates(self, folder: Path, validates: bool) -> bool:
        """Whether a network between the training's start and its end is handed over, and none of its epochs."""
        if not self.strategy.interpolates or (says_what_to_choose_by(self.settings) and validates):
            return False
        # A run that begins from a checkpoint of another one does not see where the training began.
        return self.checkpoint is None or (self.origin.resumed is not None and saw_the_start(folder))

    def _require_validation(self) -> bool:
        """Whether there are validation images; without them there is nothing that could stop early."""
        validates = len(self.datamodule.table.rows("val")) > 0
        if self.settings.patience is not None and not validates:
            raise UserError(
                "patience: expected validation images to see by when training gets no better, found none; set "
                "data.val_fraction above 0, or remove patience."
            )
        return validates

    @property
    def strategy(self) -> Strategy:
        """What is trained, and what is frozen."""
        return self.config_init[self.subcommand].finetuning

    # What the subcommands do: LightningCLI calls a method of the subcommand's name where there is one.

    def fit(self, model: ClassificationTask, datamodule: ImageDataModule, **_: Any) -> None:
        """Train, then evaluate, track and register the best checkpoint (see :class:`~pipeline.fitting.Fitting`)."""
        _require_fitting_input(model, datamodule.preprocessing)
        if model.fallback_reason is not None:
            warn_scratch(model.fallback_reason)
        if self.strategy.needs_weights and self.checkpoint is None and model.load_report is None:
            raise UserError(
                f"finetuning: expected pretrained weights for {type(self.strategy).__name__} to build on, found random "
                "ones; set model.weights, or finetuning to FullFineTuning."
            )
        for line in brief(self.trainer, model, datamodule, self.strategy, self.monitor, self.plan, self.checkpoint):
            say(line)
        self.fitting.run(self.trainer, model, datamodule, self.checkpoint)

    def validate(self, model: ClassificationTask, datamodule: ImageDataModule, **_: Any) -> None:
        """Print the metrics of a checkpoint on the validation images."""
        if not len(datamodule.table.rows("val")):
            raise UserError(
                "validate: expected validation images, found none (data.val_fraction is 0); use `test`, or "
                "`crossvalidate`."
            )
        self._evaluate("val", model, datamodule)

    def test(self, model: ClassificationTask, datamodule: ImageDataModule, **_: Any) -> None:
        """Print the metrics of a checkpoint on the test images; ``--output`` keeps the predictions."""
        self._evaluate("test", model, datamodule)

    def _evaluate(self, split: str, task: ClassificationTask, data: ImageDataModule) -> None:
        assert self.checkpoint is not None
        evaluated = evaluate(self.trainer, split, task, data, self.checkpoint, self.collector)
        evaluated.say(f"checkpoint {self.checkpoint}")
        if self.settings.output is not None and self.trainer.is_global_zero:
            write_csv(Path(self.settings.output), evaluated.paths, evaluated.predictions, task.classes)
            say(f"predictions in {self.settings.output}")

    def predict(self, model: ClassificationTask, datamodule: ImageDataModule, **_: Any) -> None:
        """Write the predictions of images, or of the test split, to a CSV file, or in parts into a folder."""
        assert self.checkpoint is not None
        output = Path(self.settings.output)
        if output.suffix.lower() != CSV:
            scoring = BulkScoring(self.trainer, model, datamodule, self.checkpoint, self.collector, self.meter)
            interruptible(self.trainer, scoring.run, output)
            return
        interruptible(
            self.trainer,
            self.trainer.predict,
            model,
            datamodule=datamodule,
            ckpt_path=self.checkpoint,
            weights_only=True,
            return_predictions=False,
        )
        if self.trainer.is_global_zero:
            assert self.collector.collected is not None
            paths = datamodule.images("predict").paths
            write_csv(output, paths, self.collector.collected, model.classes)
            say(f"{len(paths):,} predictions in {output}")


def _require_fitting_input(task: ClassificationTask, preprocessing: Preprocessing) -> None:
    """Try the network on an empty picture: some take one size only, or one that their patches divide."""
    shape = (1, preprocessing.channels, preprocessing.size, preprocessing.size)
    try:
        with torch.inference_mode():
            task.eval()(torch.zeros(shape, dtype=torch.uint8))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"data.image_size: expected a size that {task.hparams['backbone']} takes, found {preprocessing.size} "
            f"({reason}); leave data.image_size out for the size of its weights."
        ) from error
    finally:
        task.train()
