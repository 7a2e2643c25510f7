"""Stopping training so that it can go on."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from pipeline.runs import LAST, RunFolder


class GracefulInterrupt(Callback):
    """On Ctrl-C, finish the training step, save ``last.ckpt`` and raise ``KeyboardInterrupt``.

    An exception in the middle of a step would leave the optimizer half applied and the data loader a batch ahead.
    A second Ctrl-C stops at once, and the last checkpoint that was saved remains.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._asked = False
        self._previous: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
        print("\nInterrupted: stopping after this step. Press Ctrl-C again to stop at once.", file=sys.stderr)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._all_asked(trainer):
            trainer.save_checkpoint(self.folder.path / LAST)
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Asked during the validation that ended this epoch: its end has just been saved.
        if self._all_asked(trainer):
            raise KeyboardInterrupt

    def _all_asked(self, trainer: Trainer) -> bool:
        # All processes stop at the same step, whoever heard the signal first.
        return (
            trainer.strategy.reduce_boolean_decision(self._asked, all=False) if trainer.world_size > 1 else self._asked
        )
