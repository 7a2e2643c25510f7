"""What a person sees while a run goes on."""

import math
import sys
import textwrap
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from datamodules import ImageDataModule
from datamodules.checking import first_of

_REFRESHED = 0.5  # seconds from one look at the loss to the next


@rank_zero_only
def say(text: str = "") -> None:
    """Print a line, from the first process alone."""
    print(text, flush=True)


@rank_zero_only
def warn_scratch(reason: str) -> None:
    """Say so that no one can miss it that there are no pretrained weights."""
    bar = "!" * 100
    print(
        f"{bar}\n!! TRAINING FROM SCRATCH, without the pretrained weights that were asked for.",
        file=sys.stderr,
    )
    print(textwrap.fill(reason, 96, initial_indent="!! ", subsequent_indent="!! "), file=sys.stderr)
    print(
        f"!! Expect a much weaker model. The run is tagged weights=scratch.\n{bar}",
        file=sys.stderr,
        flush=True,
    )


class Meter:
    """A bar for what takes long beside training, such as trying every image; it goes when that is done.

    Args:
        shown: whether a person is looking; otherwise nothing is shown.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._bar: tqdm[Any] | None = None
        self._what = ("", 0)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Tell how much of something is done, of how much."""
        if not self.shown:
            return
        if self._bar is not None and self._what != (what, total):
            self._bar.close()
            self._bar = None
        if self._bar is None:
            self._what = what, total
            self._bar = tqdm(desc=what, total=total, leave=False, unit=" images", file=sys.stdout)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None


class ProgressBar(TQDMProgressBar):
    """A bar for the epoch that runs, counted from one as the lines above it; it goes when the epoch is over.

    Showing the loss makes the host wait for the device, so it is looked at twice a second. (What is logged for a bar in
    Lightning 2.6.6 is read at every step, shown or not.)
    """

    def __init__(self) -> None:
        super().__init__(leave=False)
        self._loss = math.nan
        self._shown = -math.inf

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.monotonic(), batch_idx + 1
        due = now - self._shown >= _REFRESHED
        if self.is_enabled and ((due and step % self.refresh_rate == 0) or step == self.total_train_batches):
            # Lightning hands out the share of the loss that goes into the sum of the gradients.
            self._loss, self._shown = float(outputs["loss"]) * trainer.accumulate_grad_batches, now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the end of the tracked run's id, which says nothing
        return {**metrics, "loss": self._loss}

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer, *_)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}")


class LeftOutLine(Callback):
    """One line, before the model sees anything, that names the images that are left out because they cannot be read.

    Args:
        data: what is read.
    """

    def __init__(self, data: ImageDataModule) -> None:
        self.data = data
        self._told: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        left_out = self.data.left_out
        if left_out != self._told:  # `fit` goes on to validate and test with the same
            images = "1 image" if len(left_out) == 1 else f"{len(left_out):,} images"
            say(f"skipped    {images} that cannot be read: {first_of(left_out)}")
            self._told = left_out


class EpochLines(Callback):
    """One plain line an epoch, and the training throughput.

    Args:
        best: decides which epoch is best; None: none is chosen.
    """

    def __init__(self, best: ModelCheckpoint | None) -> None:
        self.best = best
        self.images = 0
        self.seconds = 0.0
        self._started = 0.0
        self._epoch_started = 0.0

    @property
    def images_per_second(self) -> float:
        """Training images per second, over all processes, without validation."""
        return self.images / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that goes on in the middle of an epoch does not start that epoch again.
        self._started = self._epoch_started = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = self._epoch_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        self.images += len(batch["target"]) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.seconds += time.perf_counter() - self._started

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += time.perf_counter() - self._started
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        names = ["train/loss_epoch", "val/loss", "val/accuracy", "val/macro_f1", "val/mean_average_precision"]
        shown = "  ".join(f"{name.removesuffix('_epoch')} {metrics[name]:.4f}" for name in names if name in metrics)
        seconds = time.perf_counter() - self._epoch_started
        line = f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}  {shown}  {seconds:5.1f} s"
        line += f"  best {self.best.monitor}" if self.best is not None and _is_best(self.best, metrics) else ""
        if trainer.is_global_zero:
            bar = trainer.progress_bar_callback
            bar.print(line) if bar is not None else say(line)


def _is_best(best: ModelCheckpoint, metrics: dict[str, float]) -> bool:
    # The checkpoint is written after this line, and knows the best score before.
    assert best.monitor is not None
    value, so_far = metrics.get(best.monitor), best.best_model_score
    if value is None:
        return False  # this epoch was not validated
    if so_far is None:
        return True
    return value < float(so_far) if best.mode == "min" else value > float(so_far)
