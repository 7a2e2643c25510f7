"""Writing down, when training starts, everything that a run can be repeated and found by."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from pipeline.runs import CONFIG, PLAN, SPLIT, RunFolder
from pipeline.tracking.logger import MLflowLogger

_RATES_EVERY = 10  # optimizer steps


@dataclass(frozen=True)
class DataFacts:
    """What is told of the data.

    Attributes:
        name: of the data set.
        root: where it was read.
        digest: of every row.
        counts: images by split and class.
        left_out: gives the images that are left out because they cannot be read, once they are known.
    """

    name: str
    root: Path
    digest: str
    counts: Mapping[str, Mapping[str, int]]
    left_out: Callable[[], Sequence[str]]


class RunRecorder(Callback):
    """Puts configuration, data and tags into the tracked run, from the first process.

    Args:
        logger: of the run.
        folder: of the run; made before.
        data: what is told of the data.
        tags: of the run.
    """

    def __init__(self, logger: MLflowLogger, folder: RunFolder, data: DataFacts, tags: Mapping[str, str]) -> None:
        self.logger = logger
        self.folder = folder
        self.data = data
        self.tags = tags

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        logger = self.logger
        self.folder.write_identity(self.identity)  # before the store can answer, which fills it in
        logger.log_hyperparams(yaml.safe_load(self.folder.config))
        logger.set_tags({**self.tags, "mlflow.source.git.commit": self.tags["code_revision"]})
        logger.set_tags({"skipped_images": str(len(self.data.left_out()))})
        logger.log_dataset(self.data.name, self.data.digest, str(self.data.root), json.dumps(self.data.counts))
        for name in (CONFIG, PLAN, SPLIT):
            logger.log_file(self.folder.path / name)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and trainer.global_step % _RATES_EVERY == 0:
            # Groups with and without weight decay share their rate.
            rates = {
                f"lr/{group['name'].partition('.')[0]}": group["lr"] for group in trainer.optimizers[0].param_groups
            }
            self.logger.log_metrics(rates, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.logger.flush()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.logger.flush()  # so that a person who watches sees every epoch

    @property
    def identity(self) -> dict[str, Any]:
        """Where the tracked run is found."""
        logger = self.logger
        return {
            "run_id": logger.run_id,
            "experiment_id": logger.experiment_id,
            "tracking_uri": logger.tracking_uri,
        }
