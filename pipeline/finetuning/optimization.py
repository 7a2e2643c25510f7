"""Parameter groups and the learning-rate schedule."""

import math
import statistics
from typing import Any

from torch import nn

from pipeline.models.backbones import depth_groups

#: A step, as a share of the weights' own size.
RELATIVE_STEP = 4.5e-3
#: Images a step that this is meant for, and images in all; four times as many, and more, bear steps of twice the size.
USUAL_BATCH, USUAL_IMAGES = 32, 500
_MOST_GROWTH = 2.0
#: A step that norms and biases of any pretrained network can stand.
MOST = 2e-4
_SCRATCH_RATE = 1e-3


def weight_scale(network: nn.Module, head: str) -> float:
    """Root mean square of the weights of a layer, the median over the layers below the head.

    Args:
        network: with its weights loaded.
        head: name of the classifier inside the network, such as ``fc``.
    """
    scales = [
        float(parameter.detach().square().mean().sqrt())
        for name, parameter in network.named_parameters()
        if parameter.ndim > 1 and not name.startswith(f"{head}.")
    ]
    return statistics.median(scales) if scales else 1.0


def default_rates(
    scale: float, pretrained: bool, batch_size: int = USUAL_BATCH, images: int = USUAL_IMAGES
) -> tuple[float, float]:
    """Learning rates for Adam, of the backbone and of a fresh head.

    A step of Adam moves every weight by about the rate: a rate that is a share of the weights' own size means the same
    for all weights, however they are scaled (after Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235, section
    8). Norms and biases have a size of their own, whatever that of the weights, and limit the rate. Pretrained features
    are worth keeping and want small steps; a fresh head learns faster. From scratch there is nothing to keep. Batches a
    quarter as large are twice as noisy, and want half the rate (Malladi et al. 2022, https://arxiv.org/abs/2205.10287).
    What many images say may lead further away from what was there before.

    Args:
        scale: of the weights (:func:`weight_scale`).
        pretrained: whether there is something to keep.
        batch_size: images a step, on all devices together.
        images: that train.

    Example:
        >>> [round(rate, 6) for rate in default_rates(0.02, pretrained=True)]
        [9e-05, 0.0009]
        >>> [round(rate, 6) for rate in default_rates(0.02, pretrained=True, batch_size=8)]
        [4.5e-05, 0.00045]
        >>> [round(rate, 6) for rate in default_rates(0.02, pretrained=True, images=2_000)]
        [0.00018, 0.0018]
    """
    if not pretrained:
        return _SCRATCH_RATE, _SCRATCH_RATE
    step = RELATIVE_STEP * growth(images) * scale * math.sqrt(batch_size / USUAL_BATCH)
    rate = float(f"{min(step, MOST):.2g}")
    return rate, 10 * rate


def growth(images: int) -> float:
    """How many times larger steps may be than those for few images."""
    return min(_MOST_GROWTH, max(1.0, math.sqrt(images / USUAL_IMAGES)))


def parameter_groups(
    network: nn.Module,
    head: str,
    learning_rate: float,
    head_learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for AdamW: backbone and head with a learning rate each; norms and biases without decay.

    Parameters with one dimension (scales and shifts of normalisations, biases) are not decayed: shrinking them
    does not simplify the function (He et al. 2019, https://arxiv.org/abs/1812.01187, section 3.1).

    Args:
        network: the network; parameters that need no gradient are left out.
        head: name of the classifier inside the network, such as ``fc``.
        learning_rate: of the backbone; with ``layer_decay``, of its last stage.
        head_learning_rate: of the classifier.
        weight_decay: of the other parameters, decoupled (per unit of learning rate).
        layer_decay: factor of the rate from each stage to the one before, in (0, 1]: early layers see what all
            pictures share, and move less (Clark et al. 2020, https://arxiv.org/abs/2003.10555, as ELECTRA's).

    Returns:
        Groups with the keys ``params``, ``lr``, ``weight_decay`` and ``name``: ``backbone`` (with ``layer_decay``,
        ``backbone0`` for the stem, ``backbone1`` ...) and ``head``, each also as ``<name>.no_decay``.
    """
    rates = {head: head_learning_rate}
    stages = depth_groups(network, coarse=True)[:-1] if layer_decay != 1 else [[]]
    stage_of = {name: stage for stage, names in enumerate(stages) for name in names}
    for stage in range(len(stages)):
        rates[_backbone(stage, layer_decay)] = learning_rate * layer_decay ** (len(stages) - 1 - stage)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        in_head = name.startswith(f"{head}.")
        part = head if in_head else _backbone(stage_of.get(name, 0), layer_decay)
        decays = parameter.ndim > 1
        key = f"{'head' if in_head else part}{'' if decays else '.no_decay'}"
        if key not in groups:
            groups[key] = {
                "params": [],
                "lr": rates[part],
                "weight_decay": weight_decay if decays else 0.0,
                "name": key,
            }
        groups[key]["params"].append(parameter)
    return list(groups.values())


def _backbone(stage: int, layer_decay: float) -> str:
    return "backbone" if layer_decay == 1 else f"backbone{stage}"


def cosine_with_warmup(step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor of the learning rate at an optimizer step: a linear rise to 1, then half a cosine down to 0.

    Loshchilov and Hutter 2017 (https://arxiv.org/abs/1608.03983, equation 5, one period).

    Example:
        >>> [round(cosine_with_warmup(step, total_steps=10, warmup_steps=2), 2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
