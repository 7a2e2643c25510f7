"""Callbacks of what was tried and is no part of the product; ``benchmarks/defaults.py`` measures them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional

from pipeline import fitting
from pipeline.checkpoints import read_checkpoint
from pipeline.finetuning.statistics import normalisations
from pipeline.models.resnet import Block
from pipeline.task import ClassificationTask


class L2SP(Callback):
    """Pulls the backbone back to where it began (Li et al. 2018, https://arxiv.org/abs/1802.01483, L2-SP).

    The pull is decoupled from Adam's, as weight decay is: each step goes ``rate * strength`` of the way back.

    Args:
        strength: of the pull.
    """

    def __init__(self, strength: float = 30.0) -> None:
        self.strength = strength

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if batch_idx == trainer.current_epoch == 0:
            self.start = {name: tensor.detach().clone() for name, tensor in self._pulled(pl_module).items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        with torch.no_grad():
            for name, tensor in self._pulled(pl_module).items():
                tensor.lerp_(self.start[name], min(1.0, rate * self.strength))

    @staticmethod
    def _pulled(task: LightningModule) -> dict[str, nn.Parameter]:
        head = f"network.{task.head}."
        return {
            name: tensor
            for name, tensor in task.named_parameters()
            if tensor.requires_grad and not name.startswith(head)
        }


class MovingAverage(Callback):
    """Hands over a moving average of what was trained, statistics of batch normalisations included.

    (Polyak and Juditsky 1992, https://doi.org/10.1137/0330046. Lightning's own callback also averages what is frozen.)

    Args:
        decay: of the average, a step.
    """

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = decay

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if batch_idx == trainer.current_epoch == 0:
            self.average = {name: tensor.detach().clone() for name, tensor in self._trained(pl_module).items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        for name, tensor in self._trained(pl_module).items():
            self.average[name].lerp_(tensor.detach(), 1 - self.decay)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            with torch.no_grad():
                for name, tensor in self._trained(pl_module).items():
                    tensor.copy_(self.average[name])

    @staticmethod
    def _trained(task: LightningModule) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {name: tensor for name, tensor in task.named_parameters() if tensor.requires_grad}
        norms = normalisations(task.network)
        moving = {name: norm for name, norm in norms.items() if norm.weight is None or norm.weight.requires_grad}
        for name, norm in moving.items():
            tensors |= {f"{name}.running_mean": norm.running_mean, f"{name}.running_var": norm.running_var}
        return tensors


class StochasticDepth(Callback):
    """Leaves out branches of the residual network at random (Huang et al. 2016, https://arxiv.org/abs/1603.09382).

    Args:
        rate: share of images for which the last branch is left out; earlier ones less, in proportion to their depth.
    """

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        blocks = [module for module in pl_module.network.modules() if isinstance(module, Block)]
        for number, block in enumerate(blocks, 1):
            block.last_norm.register_forward_hook(self._leave_out(self.rate * number / len(blocks)))

    @staticmethod
    def _leave_out(rate: float):
        def hook(norm: nn.Module, inputs: tuple[Tensor], branch: Tensor) -> Tensor:
            if not norm.training:
                return branch
            kept = torch.rand(len(branch), 1, 1, 1, device=branch.device) >= rate
            return branch * kept / (1 - rate)

        return hook


class LabelSmoothing(Callback):
    """Spreads a share of each target over all classes (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567).

    Args:
        share: that is spread.
    """

    def __init__(self, share: float = 0.1) -> None:
        self.share = share

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.objective.register_forward_hook(self._spread)

    def _spread(self, objective: nn.Module, inputs: tuple[Tensor, Tensor], losses: Tensor) -> Tensor:
        return (1 - self.share) * losses - self.share * inputs[0].log_softmax(dim=1).mean(dim=1)


class Untempered(Callback):
    """Leaves probabilities as the network gives them."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting.fit_temperature = lambda predictions: 1.0
        fitting.USUAL_TEMPERATURE = 1.0


class Distillation(Callback):
    """Learns from a larger network's answers, too (Hinton, Vinyals and Dean 2015, https://arxiv.org/abs/1503.02531).

    The teacher is a ResNet-50 that the very command of this run has fitted to the same images before.

    Args:
        share: of the teacher in the loss; the rest is the labels'.
        softness: temperature at which both answer.
    """

    def __init__(self, share: float = 0.5, softness: float = 2.0) -> None:
        self.share, self.softness = share, softness

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = Path(os.environ["PIPELINE_MATERIAL"]) / "weights/resnet50_imagenet.fp16.safetensors"
        larger = ["--model.backbone=resnet50", f"--model.weights={weights}", "--trainer.callbacks=null"]
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "pipeline", *sys.argv[1:], *larger], cwd=folder, check=True)
            (kept,) = Path(folder).glob("runs/*/best.ckpt")
            content = read_checkpoint(kept)
        self.teacher = ClassificationTask(**content["hyper_parameters"]).to(pl_module.device).eval()
        self.teacher.load_state_dict(content["state_dict"])
        pl_module.objective.register_forward_hook(self._mix)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        with torch.inference_mode(), torch.autocast(pl_module.device.type, torch.bfloat16):
            self.taught = self.teacher(batch["image"]).float()

    def _mix(self, objective: nn.Module, inputs: tuple[Tensor, Tensor], losses: Tensor) -> Tensor:
        own = (inputs[0] / self.softness).log_softmax(dim=1)
        taught = (self.taught / self.softness).softmax(dim=1)
        # A softer answer has smaller gradients, by the square of the softness.
        divergence = functional.kl_div(own, taught, reduction="none").sum(dim=1) * self.softness**2
        return (1 - self.share) * losses + self.share * divergence
