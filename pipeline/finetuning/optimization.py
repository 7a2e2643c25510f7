"""Parameter groups and the learning-rate schedule."""

import math
import statistics
from typing import Any

from torch import nn


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


def parameter_groups(
    network: nn.Module, head: str, learning_rate: float, head_learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW: backbone and head with a learning rate each; norms and biases without decay.

    Parameters with one dimension (scales and shifts of normalisations, biases) are not decayed: shrinking them
    does not simplify the function (He et al. 2019, https://arxiv.org/abs/1812.01187, section 3.1).

    Args:
        network: the network; parameters that need no gradient are left out.
        head: name of the classifier inside the network, such as ``fc``.
        learning_rate: of the backbone.
        head_learning_rate: of the classifier.
        weight_decay: of the other parameters, decoupled (per unit of learning rate).

    Returns:
        Up to four groups with the keys ``params``, ``lr``, ``weight_decay`` and ``name``.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        in_head = name.startswith(f"{head}.")
        decays = parameter.ndim > 1
        key = f"{'head' if in_head else 'backbone'}{'' if decays else '.no_decay'}"
        if key not in groups:
            rate = head_learning_rate if in_head else learning_rate
            groups[key] = {
                "params": [],
                "lr": rate,
                "weight_decay": weight_decay if decays else 0.0,
                "name": key,
            }
        groups[key]["params"].append(parameter)
    return list(groups.values())


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
