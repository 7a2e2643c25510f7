"""What is learned: image classification with a network, its loss, its metrics and its optimizer."""

import math
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluation.calibration import temper
from pipeline.evaluation.familiarity import Familiarity
from pipeline.evaluation.predictions import to_probabilities
from pipeline.evaluation.validation import MeanLoss, validation_metrics
from pipeline.finetuning.optimization import cosine_with_warmup, default_rates, parameter_groups, weight_scale
from pipeline.finetuning.statistics import use_stored_statistics
from pipeline.mixing import Kind, mix
from pipeline.models.backbones import create_backbone, describe, head_name
from pipeline.models.files import LINEAGE
from pipeline.models.hub import HubUnreachableError
from pipeline.models.kernel_head import match_head
from pipeline.models.weights import Lineage, LoadReport, load_pretrained
from pipeline.objective import Imbalance, Objective
from pipeline.precision import full_float32

Batch = dict[str, Tensor]

# Integers are scaled to [0, 1]; floats are taken as they are.
_LARGEST = {torch.uint8: 255.0, torch.uint16: 65535.0}
# Axes of (N, C, H, W) that are mirrored in each view beside the image itself.
_VIEWS: dict[str, list[tuple[int, ...]]] = {"none": [], "flip": [(3,)], "flips": [(3,), (2,), (2, 3)]}


#: Under which a checkpoint keeps what tells familiar images from strange ones.
FAMILIARITY = "familiarity"


class Answer(NamedTuple):
    """What is said of images.

    Attributes:
        probabilities: float32 ``(N, number of classes)``; rows sum to 1 unless an image may have several classes.
        familiarity: float32 ``(N,)`` in (0, 1] (see :class:`~pipeline.evaluation.familiarity.Familiarity`); None where
            no images were held out to measure it by.
    """

    probabilities: Tensor
    familiarity: Tensor | None


class ClassificationTask(LightningModule):
    """Classification of images, into one class each or, with ``multi_label``, into any number of them.

    Takes batches ``{"image": uint8 (N, C, H, W), "target": int64 (N,), "index": int64 (N,)}`` and scales and
    normalises the images on the device, as ``preprocessing`` says. Images may be uint16 or float32; with
    ``multi_label`` the target is float32 ``(N, number of classes)``; ``weight``, float32 ``(N,)``, weighs images in the
    training loss. Training runs in the trainer's precision, evaluation always in float32.

    Args:
        classes: the label space in order; output ``i`` scores ``classes[i]``.
        preprocessing: the record that belongs to the weights (``mean`` and ``std`` are used here).
        backbone: an architecture: one that ``python -m pipeline backbones`` lists, or ``timm/<model>``.
        weights: where training starts: ``timm/<tag>``, ``hf-hub:<owner>/<repository>``, ``torchvision/<name>``, a
            file, ``package:<module>/<file>``, or nothing; on the command line ``models:/<name>@<alias>``, too.
        weights_fallback: what to do when the model hub cannot be reached: ``error``, or ``scratch`` to train
            without pretrained weights.
        learning_rate: of the backbone; ``auto``: see :func:`~pipeline.finetuning.optimization.default_rates`.
        head_learning_rate: of the classifier; ``auto``: as of a fresh one.
        weight_decay: of all parameters but norms and biases.
        layer_decay: factor of the rate from each stage of the backbone to the one before, in (0, 1].
        warmup_fraction: share of the optimizer steps in which the rates rise from zero, in [0, 1).
        dropout: share of the features zeroed before the classifier while training, in [0, 1).
        head_stages: how many of the backbone's last stages the classifier sees, 1 to 3 (1 where all maps are of one
            size, as of most transformers); ``auto``: 1.
        batch_norm: by which statistics images are normalised in training: ``batch``: those of their batch, and stored
            ones follow them; ``stored``: the stored ones, which stay as they were; ``auto``: ``batch``.
        mixing: of the images of a training batch: ``mixup``, ``cutmix``, or ``either`` of them for each batch.
        mixing_alpha: strength of the mixing, above 0; ``auto``: 0.2 for mixup, 1.0 for CutMix.
        test_time_augmentation: views of an image whose probabilities are averaged in evaluation and in the registered
            model: ``flip``: as it is and mirrored; ``flips``: mirrored left to right, top to bottom, and both, too;
            ``auto``: none.
        multi_label: whether an image may have several classes; follows the data.
        imbalance: what is done for rare classes (see :class:`~pipeline.objective.Objective`); follows ``imbalance`` on
            the command line.
        class_shares: share of the training images that have each class; follows the data.
        seed: of the mixing; follows ``seed_everything`` on the command line.

    Raises:
        UserError: a value is out of range, or backbone or weights are unknown or do not fit.

    Example:
        >>> record = {"mean": [0.5] * 3, "std": [0.25] * 3}
        >>> task = ClassificationTask(classes=["cat", "dog"], preprocessing=record)
        >>> task(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([1, 2])
    """

    mean: Tensor
    std: Tensor
    temperature: Tensor

    def __init__(
        self,
        classes: list[str],
        preprocessing: dict[str, Any],
        backbone: str = "resnet18",
        weights: str | None = None,
        weights_fallback: Literal["error", "scratch"] = "error",
        learning_rate: float | Literal["auto"] = "auto",
        head_learning_rate: float | Literal["auto"] = "auto",
        weight_decay: float = 0.05,
        layer_decay: float = 1.0,
        warmup_fraction: float = 0.1,
        dropout: float = 0.0,
        head_stages: int | Literal["auto"] = "auto",
        batch_norm: Literal["auto", "batch", "stored"] = "auto",
        mixing: Kind = "none",
        mixing_alpha: float | Literal["auto"] = "auto",
        test_time_augmentation: Literal["auto", "none", "flip", "flips"] = "auto",
        multi_label: bool = False,
        imbalance: Imbalance = "none",
        class_shares: list[float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mixing_alpha != "auto" and not 0 < mixing_alpha < math.inf:
            raise UserError(f"model.mixing_alpha: expected a finite strength above 0, found {mixing_alpha}.")
        for name, share in (("warmup_fraction", warmup_fraction), ("dropout", dropout)):
            if not 0 <= share < 1:
                raise UserError(f"model.{name}: expected a share in [0, 1), found {share}.")
        head_stages = 1 if head_stages == "auto" else head_stages
        network = create_backbone(backbone, len(classes), len(preprocessing["mean"]), dropout, head_stages)
        #: What was loaded; None where training starts from scratch.
        self.load_report: LoadReport | None = None
        #: Where the weights come from; kept in checkpoints.
        self.lineage = Lineage()
        #: Why weights that were asked for are not there; None otherwise.
        self.fallback_reason: str | None = None
        if weights is not None:
            try:
                self.load_report = load_pretrained(network, weights)
                self.lineage = self.load_report.lineage
            except HubUnreachableError as error:
                if weights_fallback == "error":
                    raise
                self.fallback_reason = str(error)
        rates = default_rates(weight_scale(network, head_name(network)), self.load_report is not None)
        learning_rate = rates[0] if learning_rate == "auto" else learning_rate
        head_learning_rate = rates[1] if head_learning_rate == "auto" else head_learning_rate
        for name, rate in (("learning_rate", learning_rate), ("head_learning_rate", head_learning_rate)):
            if not rate > 0:
                raise UserError(f"model.{name}: expected a rate above 0, found {rate}.")
        if not weight_decay >= 0:
            raise UserError(f"model.weight_decay: expected 0 or more, found {weight_decay}.")
        if not 0 < layer_decay <= 1:
            raise UserError(f"model.layer_decay: expected a factor in (0, 1], found {layer_decay}.")
        # The weights' address starts a run and is no property of the trained model: a checkpoint must load where
        # that address cannot be reached. Rates are kept as resolved. The command line logs its whole configuration.
        self.save_hyperparameters(ignore=["weights", "weights_fallback", "class_shares"], logger=False)
        self.hparams["head_stages"] = head_stages
        self.hparams["learning_rate"] = learning_rate
        self.hparams["head_learning_rate"] = head_learning_rate
        self.hparams["test_time_augmentation"] = "none" if test_time_augmentation == "auto" else test_time_augmentation
        self.head = head_name(network)
        self.network = network.to(memory_format=torch.channels_last)
        self.classes = list(classes)
        for name in ("mean", "std"):
            values = torch.tensor(preprocessing[name], dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        # Of the probabilities; fitted when training is over, and kept in the best checkpoint.
        self.register_buffer("temperature", torch.ones(()))
        #: What tells familiar images from strange ones; measured after training, and kept in the best checkpoint.
        self.familiarity: Familiarity | None = None
        self.class_shares = class_shares
        self._in_training = False
        self.val_metrics = validation_metrics(len(classes), multi_label)
        # Weighted by images, because processes may hold unequally many; Lightning's own mean over processes is not.
        self.train_loss = MeanLoss()
        self.val_loss = MeanLoss()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[LINEAGE] = asdict(self.lineage)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.lineage = Lineage(**checkpoint[LINEAGE])
        state = checkpoint["state_dict"]
        match_head(self.network, self.head, {name.removeprefix("network."): state[name] for name in state})
        # Checkpoints of earlier releases are not calibrated.
        state.setdefault("temperature", torch.ones(()))
        measured = checkpoint.get(FAMILIARITY)
        self.familiarity = None if measured is None else Familiarity(**measured).to(self.device)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            hparams = self.hparams
            objective = Objective(hparams["multi_label"], hparams["imbalance"], self.class_shares)
            self.objective = objective.to(self.device)

    def normalise(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)``, uint8, uint16 or float32, to what the network takes, float32 of the same shape."""
        scaled = images.to(torch.float32) / _LARGEST.get(images.dtype, 1.0)
        normalised = (scaled - self.mean) / self.std
        return normalised.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Images, uint8 (or uint16, float32) ``(N, C, H, W)``, to logits, float ``(N, number of classes)``."""
        return self.network(self.normalise(images))

    def answer(self, images: Tensor) -> Answer:
        """What evaluation and the registered model answer: probabilities, averaged over the test-time views, tempered.

        Args:
            images: uint8 (or uint16, float32) ``(N, C, H, W)``.
        """
        familiarity = None
        if self.familiarity is None:
            logits = self(images)
        else:
            logits, stages = describe(self.network, self.normalise(images))
            familiarity = self.familiarity(stages)
        others = [self(images.flip(view)) for view in _VIEWS[self.hparams["test_time_augmentation"]]]
        views = [to_probabilities(view, self.hparams["multi_label"]) for view in (logits, *others)]
        probabilities = temper(torch.stack(views).mean(dim=0), self.temperature, self.hparams["multi_label"])
        return Answer(probabilities, familiarity)

    def on_train_end(self) -> None:
        self._in_training = False

    def on_train_start(self) -> None:
        self._in_training = True
        # What was found of a network that training goes on from is not true of what comes out.
        self.temperature.fill_(1.0)
        self.familiarity = None
        # Once: the trainer gives every module its own mode back after validation.
        if self.hparams["batch_norm"] == "stored":
            use_stored_statistics(self.network)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.hparams["dropout"] > 0:  # the same is dropped in a run that went on from here
            place = (self.hparams["seed"], self.current_epoch, batch_idx, self.global_rank)
            torch.manual_seed(int(np.random.default_rng(place).integers(2**63)))
        images, target = self.normalise(batch["image"]), batch["target"]
        weight = batch.get("weight", torch.ones((), device=images.device))
        kind, alpha = self.hparams["mixing"], self.hparams["mixing_alpha"]
        if kind == "none":
            losses = self.objective(self.network(images).float(), target) * weight
        else:
            key = (self.hparams["seed"], self.current_epoch, batch_idx)
            mixture = mix(images, kind, None if alpha == "auto" else alpha, key)
            logits, weight = self.network(mixture.images).float(), weight.expand(len(images))
            own = self.objective(logits, target) * weight
            other = self.objective(logits, target[mixture.partner]) * weight[mixture.partner]
            losses = mixture.share * own + (1 - mixture.share) * other
        loss = losses.mean()
        self.train_loss.update(loss, len(images))
        self.log("train/loss", loss, on_step=True, on_epoch=False)
        self.log("train/loss_epoch", self.train_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        if self._in_training:  # one view in the training's precision says well enough how it goes
            probabilities = to_probabilities(self(batch["image"]).float(), self.hparams["multi_label"])
            outputs = _answered(batch, Answer(probabilities, None))
        else:
            outputs = self._evaluate(batch)
        probabilities, target = outputs["probabilities"], batch["target"]
        self.val_metrics.update(probabilities, target)
        self.val_loss.update(_log_loss(probabilities, target), len(target))
        self.log("val/loss", self.val_loss)
        self.log_dict(self.val_metrics)
        return outputs

    def test_step(self, batch: Batch, batch_idx: int) -> Batch:
        return self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        return self._evaluate(batch)

    def _evaluate(self, batch: Batch) -> Batch:
        with torch.autocast(self.device.type, enabled=False), full_float32():
            return _answered(batch, self.answer(batch["image"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        rates = self.hparams["learning_rate"], self.hparams["head_learning_rate"]
        decays = self.hparams["weight_decay"], self.hparams["layer_decay"]
        groups = parameter_groups(self.network, self.head, *rates, *decays)
        # One pass over each tensor. Lightning 2.6.6 does not clip what such an optimizer would unscale by itself.
        optimizer = torch.optim.AdamW(groups, fused=not self.trainer.gradient_clip_val)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = round(total * self.hparams["warmup_fraction"])
        schedule = partial(cosine_with_warmup, total_steps=total, warmup_steps=warmup)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _answered(batch: Batch, answer: Answer) -> Batch:
    given = {name: tensor for name, tensor in answer._asdict().items() if tensor is not None}
    return {"index": batch["index"], "target": batch["target"], **given}


def _log_loss(probabilities: Tensor, target: Tensor) -> Tensor:
    """Mean negative logarithm of the truth's probability. (CUDA's autocast refuses torch's own for several classes.)"""
    if target.ndim == 2:
        of_truth = torch.where(target == 1, probabilities, 1 - probabilities)
    else:
        of_truth = probabilities.gather(1, target[:, None])
    return -of_truth.clamp_min(torch.finfo(torch.float32).tiny).log().mean()
