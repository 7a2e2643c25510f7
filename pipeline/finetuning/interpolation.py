"""Between the network that training began with and the one that it ended with.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (https://arxiv.org/abs/2109.01903): on the straight line
from a network that answers well already (here the pretrained one with a solved head) to its fine-tuned self there are
networks that generalise better than both ends. Few images decide little of where to stop training; the same images say
rather well how far to go along the line, and going nowhere is one of the choices.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.evaluation.calibration import fit_temperature, tempered
from pipeline.evaluation.predictions import Predictions

State = Mapping[str, Tensor]

#: How much of the way is tried.
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
#: What is believed of the share before any image is seen: a normal distribution beyond the middle ...
USUAL_SHARE, _DEVIATION = 0.65, 0.3
#: ... and of the temperature there.
USUAL_TEMPERATURE = 1.15


class StartingPoint(Checkpoint):
    """Keeps the network as it is before the first step, when every other callback is through with it.

    (That is why it is a ``Checkpoint``: the trainer lets those come last.)

    Args:
        file: where; it is written once, and a run that is resumed finds it there.
    """

    def __init__(self, file: Callable[[], Path]) -> None:
        self._file = file

    @property
    def file(self) -> Path:
        """Where it is kept; not there in a run that began from another run's checkpoint."""
        return self._file()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.ckpt_path is None:
            state = {name: tensor.cpu().contiguous() for name, tensor in pl_module.network.state_dict().items()}  # type: ignore[union-attr]
            save_file(state, self.file)

    def read(self) -> dict[str, Tensor]:
        """What was kept."""
        return load_file(self.file)


def between(start: State, end: State, share: float) -> dict[str, Tensor]:
    """A point on the line, statistics of batch normalisations included.

    Args:
        start: of the line; tensors by name.
        end: of the line, with the same names and shapes.
        share: of the way, from 0 to 1; what is no float (a count of batches) is the end's.

    Example:
        >>> import torch
        >>> between({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)
        {'w': tensor([0.2500, 0.2500])}
    """
    return {
        name: start[name].to(tensor).lerp(tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }


def choose_share(start: State, end: State, predict: Callable[[dict[str, Tensor]], Predictions]) -> float:
    """How far to go: where held-out images are the least surprising, each network's temperature being fitted first.

    A few images are weighed against the belief that somewhat more than half of the way is good. The search goes from
    the end towards the start for as long as it gets better.

    Args:
        start: of the line.
        end: of the line.
        predict: the answers of a network to held-out images.
    """

    def surprise(share: float) -> float:
        predictions = predict(between(start, end, share))
        losses = tempered(predictions, fit_temperature(predictions)).losses
        return float(predictions.answers * losses.sum()) + ((share - USUAL_SHARE) / _DEVIATION) ** 2 / 2

    best, least = SHARES[-1], surprise(SHARES[-1])
    for share in reversed(SHARES[:-1]):
        found = surprise(share)
        if found > least:  # along the line it falls once and rises once, and each point costs a pass over the images
            break
        best, least = share, found
    return best
