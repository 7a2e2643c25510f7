"""What lets a run go on: a checkpoint after every epoch, and one when the run is interrupted."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch import distributed

from pipeline.exits import Terminated
from pipeline.runs import LAST, RunFolder

_SIGNALS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_WORDS: dict[int, tuple[str, str]] = {
    signal.SIGINT: ("Interrupted", "Press Ctrl-C again"),
    signal.SIGTERM: ("Terminated", "Send SIGTERM again"),
}

# Between two checkpoints at least so many times as long as it takes to save one, so that it costs a twentieth at most.
_LEAST_PAUSE = 20


class Patience(EarlyStopping):
    """Stops the training when a metric gets no better; a run that it has stopped stays stopped where that goes on.

    Args:
        monitor: the metric.
        mode: ``max`` or ``min``: which is better.
        epochs: without improvement that are waited.
        resumes: whether this run goes on, and has waited before; one that begins from a checkpoint of another run waits
            anew.
    """

    def __init__(self, monitor: str, mode: str, epochs: int, resumes: bool) -> None:
        super().__init__(monitor, mode=mode, patience=epochs)
        self._resumes = resumes

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._resumes:
            super().load_state_dict(state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            trainer.should_stop = True


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` and turns Ctrl-C and SIGTERM into a clean stop.

    On either the training step (or the validation) is finished, ``last.ckpt`` is saved and ``KeyboardInterrupt`` (or
    ``Terminated``) raised: an exception in the middle of a step would leave the optimizer half applied and the data
    loader a batch ahead. A second one stops at once, and the checkpoint saved before remains.

    It saves when an epoch is over (of epochs that take hardly longer than saving, not every one) for every other
    callback, early stopping and the best checkpoint included, which is why it is a ``Checkpoint`` and stands last.
    (``ModelCheckpoint(save_last=True)`` of Lightning 2.6.6 leaves out epochs that are not the best so far.)

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        #: What the run will end with, once a signal has come.
        self.asked: type[KeyboardInterrupt] | None = None
        self._previous: dict[int, Any] = {}
        self._hosts: Any = None
        self._saved: float | None = None
        self._pause = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: what comes earlier (a head is solved) can be stopped at any moment, and is begun again.
        self.asked = None
        if trainer.world_size > 1 and self._hosts is None:
            # The processes ask each other at every step, and none has to wait for its GPU meanwhile.
            self._hosts = distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():  # elsewhere, signals cannot be handled
            self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise _SIGNALS[number]
        self.asked = _SIGNALS[number]
        if os.environ.get("LOCAL_RANK", "0") == "0":
            what, again = _WORDS[number]
            print(f"\n{what}: stopping after this step or validation. {again} to stop at once.", file=sys.stderr)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not between the batches whose gradients are added up, and not before the validation that ends an epoch: a run
        # that goes on would leave these out.
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and not trainer.is_last_batch and self._all_asked(trainer):
            trainer.save_checkpoint(self.folder.path / LAST)
            raise self.asked or KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        asked = self._all_asked(trainer)
        if asked or _is_last_epoch(trainer) or self._all_due(trainer):
            began = time.monotonic()
            trainer.save_checkpoint(self.folder.path / LAST)
            self._saved = time.monotonic()
            self._pause = _LEAST_PAUSE * (self._saved - began)
        if asked:
            raise self.asked or KeyboardInterrupt

    def _all_due(self, trainer: Trainer) -> bool:
        # All processes take part in saving, and their clocks differ.
        return trainer.strategy.broadcast(self._saved is None or time.monotonic() - self._saved >= self._pause)

    def _all_asked(self, trainer: Trainer) -> bool:
        # All processes stop at the same step, whoever heard the signal first.
        if self._hosts is None:
            return self.asked is not None
        anybody = torch.tensor(self.asked is not None, dtype=torch.int32)
        distributed.all_reduce(anybody, distributed.ReduceOp.MAX, group=self._hosts)
        return bool(anybody)


def _is_last_epoch(trainer: Trainer) -> bool:
    # (The loop itself cannot be asked: its answer changes its state, and the checkpoint would be of another epoch.)
    epochs, steps = trainer.max_epochs, trainer.max_steps
    of_epochs = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return of_epochs or 0 <= steps <= trainer.global_step or trainer.should_stop
