"""What lets a run go on: a checkpoint after every epoch, and one when the person interrupts."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from pipeline.runs import LAST, RunFolder

# Between two checkpoints at least so many times as long as it takes to save one, so that it costs a twentieth at most.
_LEAST_PAUSE = 20


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` and turns Ctrl-C into a clean stop.

    On Ctrl-C the training step (or the validation) is finished, ``last.ckpt`` is saved and ``KeyboardInterrupt``
    raised: an exception in the middle of a step would leave the optimizer half applied and the data loader a batch
    ahead. A second Ctrl-C stops at once, and the checkpoint saved before remains.

    It saves when an epoch is over (of epochs that take hardly longer than saving, not every one) for every other
    callback, early stopping and the best checkpoint included, which is why it is a ``Checkpoint`` and stands last.
    (``ModelCheckpoint(save_last=True)`` of Lightning 2.6.6 leaves out epochs that are not the best so far.)

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._asked = False
        self._previous: Any = None
        self._saved: float | None = None
        self._pause = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: what comes earlier (a head is solved) can be stopped at any moment, and is begun again.
        self._asked = False
        if threading.current_thread() is threading.main_thread():  # elsewhere, signals cannot be handled
            self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                "\nInterrupted: stopping after this step or validation. Press Ctrl-C again to stop at once.",
                file=sys.stderr,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not between the batches whose gradients are added up, and not before the validation that ends an epoch: a run
        # that goes on would leave these out.
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and not trainer.is_last_batch and self._all_asked(trainer):
            trainer.save_checkpoint(self.folder.path / LAST)
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        asked = self._all_asked(trainer)
        if asked or _is_last_epoch(trainer) or self._all_due(trainer):
            began = time.monotonic()
            trainer.save_checkpoint(self.folder.path / LAST)
            self._saved = time.monotonic()
            self._pause = _LEAST_PAUSE * (self._saved - began)
        if asked:
            raise KeyboardInterrupt

    def _all_due(self, trainer: Trainer) -> bool:
        # All processes take part in saving, and their clocks differ.
        return trainer.strategy.broadcast(self._saved is None or time.monotonic() - self._saved >= self._pause)

    def _all_asked(self, trainer: Trainer) -> bool:
        # All processes stop at the same step, whoever heard the signal first.
        if trainer.world_size > 1:
            return trainer.strategy.reduce_boolean_decision(self._asked, all=False)
        return self._asked


def _is_last_epoch(trainer: Trainer) -> bool:
    # (The loop itself cannot be asked: its answer changes its state, and the checkpoint would be of another epoch.)
    epochs, steps = trainer.max_epochs, trainer.max_steps
    of_epochs = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return of_epochs or 0 <= steps <= trainer.global_step or trainer.should_stop
