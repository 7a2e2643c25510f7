"""Collecting a model's predictions over a whole split, from however many processes."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

#: Probability from which on a class counts as present, where an image may have several.
PRESENT = 0.5
#: Between the classes of one image in files.
SEPARATOR = "|"

_SMALLEST_PROBABILITY = 1e-15  # as scikit-learn's log_loss clips, so that one certain mistake stays finite


def to_probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    """Softmax over the classes, or the sigmoid of each where an image may have several; shape and dtype stay."""
    return torch.sigmoid(logits) if multi_label else torch.softmax(logits, dim=1)


@dataclass(frozen=True)
class Ranking:
    """Images by falling probability, class by class, and where in it those that have the class stand.

    Attributes:
        order: image of each place, int64 ``(C, N)``.
        present: whether it has the class, bool ``(C, N)``.
        classes: of each presence, its class, int64 ``(P,)``.
        places: its place, counted through all classes, int64 ``(P,)``.
        ends: the last place of the same class and probability, int64 ``(P,)``: equal ones cannot be ranked.
    """

    order: NDArray[np.int64]
    present: NDArray[np.bool_]
    classes: NDArray[np.int64]
    places: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of each image of a split, in the split's order.

    Attributes:
        targets: true class index of each image, int64 ``(N,)``, or int64 ``(N, C)`` of 0 and 1 where an image may have
            several classes; -1 where it is not known.
        probabilities: float64 ``(N, C)``; each row sums to 1, unless an image may have several classes.
        multi_label: whether it may.
        familiarity: how usual each image is among those trained on, float64 ``(N,)`` in (0, 1] (see
            :class:`~pipeline.evaluation.familiarity.Familiarity`); None where that was not measured.
    """

    targets: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    multi_label: bool = False
    familiarity: NDArray[np.float64] | None = None

    def first(self, count: int) -> "Predictions":
        """Those of the first images."""
        familiarity = None if self.familiarity is None else self.familiarity[:count]
        return Predictions(self.targets[:count], self.probabilities[:count], self.multi_label, familiarity)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The most probable class index of each image, int64 ``(N,)``; of several, 0 and 1 for each, ``(N, C)``."""
        if self.multi_label:
            return (self.probabilities >= PRESENT).astype(np.int64)
        return self.probabilities.argmax(axis=1)

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """The probability of the most probable class, float64 ``(N,)``."""
        return self.probabilities.max(axis=1)

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Whether an image's label is right, bool ``(N,)``; of several classes, all of them."""
        right = self.labels == self.targets
        return right.all(axis=1) if self.multi_label else right

    @property
    def answers(self) -> int:
        """How many answers an image's loss is the mean of: one or, of several classes, one for each."""
        return self.probabilities.shape[1] if self.multi_label else 1

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """Negative logarithm of the truth's probability, in nats, float64 ``(N,)``.

        Of several classes, that of each being present or absent, averaged over them.
        """
        if self.multi_label:
            of_truth = np.where(self.targets == 1, self.probabilities, 1 - self.probabilities)
        else:
            of_truth = np.take_along_axis(self.probabilities, self.targets[:, None], axis=1)
        return -np.log(np.clip(of_truth, _SMALLEST_PROBABILITY, 1.0)).mean(axis=1)

    @cached_property
    def ranking(self) -> Ranking:
        """The images of each class ranked, where an image may have several."""
        scores = self.probabilities.T
        order = np.argsort(-scores, axis=1, kind="stable")
        ranked = np.take_along_axis(scores, order, axis=1)
        present = np.take_along_axis(self.targets.T, order, axis=1) == 1
        last = np.where(
            np.diff(ranked, axis=1, append=-np.inf) != 0, np.arange(order.size).reshape(order.shape), order.size
        )
        ends = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
        places = np.flatnonzero(present)
        return Ranking(order, present, places // order.shape[1], places, ends.flat[places])


class PredictionCollector(Callback):
    """Keeps what ``validate``, ``test`` and ``predict`` put out; ``collected`` holds the last whole pass.

    Afterwards every process has the predictions of all of them.
    """

    def __init__(self) -> None:
        self.collected: Predictions | None = None
        self._parts: list[dict[str, Tensor]] = []

    def _start(self) -> None:
        self.collected = None
        self._parts = []

    def _keep(self, outputs: Any) -> None:
        self._parts.append({key: value.detach().cpu() for key, value in outputs.items()})

    def _finish(self, pl_module: LightningModule) -> None:
        gathered = {key: _gather([part[key] for part in self._parts], pl_module.device) for key in self._parts[0]}
        self._parts = []
        order = torch.argsort(gathered["index"])
        self.collected = Predictions(
            targets=gathered["target"][order].long().numpy(),
            probabilities=gathered["probabilities"][order].double().numpy(),
            multi_label=bool(pl_module.hparams["multi_label"]),
            familiarity=gathered["familiarity"][order].double().numpy() if "familiarity" in gathered else None,
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if trainer.state.fn == "validate":  # not the validations inside `fit`: nobody asks for those
            self._keep(outputs)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._keep(outputs)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._keep(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(pl_module)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(pl_module)


def _gather(parts: list[Tensor], device: torch.device) -> Tensor:
    whole = torch.cat(parts)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Ranks may hold unequally many; this call allows it.
        return torch.cat([share.cpu() for share in gather_all_tensors(whole.to(device))])
    return whole


def write_csv(path: Path, image_paths: Sequence[str], predictions: Predictions, classes: Sequence[str]) -> None:
    """One row an image: ``path``, ``target`` and ``familiarity`` where they are known, ``label``, ``score``, and
    ``p_<class>`` of each class.

    Where an image may have several classes, ``target`` and ``label`` have them joined by a bar.
    """
    labelled, familiarity = bool((predictions.targets >= 0).all()), predictions.familiarity
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        known = ["familiarity"] if familiarity is not None else []
        header = ["path", *(["target"] if labelled else []), "label", "score", *known]
        writer.writerow([*header, *(f"p_{name}" for name in classes)])
        rows = zip(
            image_paths,
            predictions.targets,
            predictions.labels,
            predictions.scores,
            predictions.probabilities,
            strict=True,
        )
        for number, (image_path, target, label, score, row) in enumerate(rows):
            truth = [_in_words(target, classes)] if labelled else []
            usual = [] if familiarity is None else [f"{familiarity[number]:.4f}"]
            answer = [_in_words(label, classes), f"{score:.8g}", *usual, *(f"{p:.8g}" for p in row)]
            writer.writerow([image_path, *truth, *answer])


def _in_words(label: NDArray[np.int64] | np.int64, classes: Sequence[str]) -> str:
    if np.ndim(label) == 0:
        return classes[int(label)]
    return SEPARATOR.join(name for name, present in zip(classes, np.atleast_1d(label), strict=True) if present)
