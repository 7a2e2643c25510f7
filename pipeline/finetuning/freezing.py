"""Frozen means frozen: parameters keep their values, normalisations their statistics, whatever mode training sets.

``requires_grad=False`` alone is not enough: batch norms in train mode go on moving their running statistics, and
normalise by those of the batch.
"""

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn


def freeze(network: nn.Module, names: Collection[str]) -> None:
    """Take parameters out of training.

    Args:
        network: changed in place.
        names: of parameters.

    Raises:
        KeyError: the network has no such parameter.
    """
    parameters = dict(network.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)


def frozen_modules(network: nn.Module) -> list[nn.Module]:
    """The modules that hold parameters, all of them frozen, in themselves and below."""
    return [
        module
        for module in network.modules()
        if (parameters := list(module.parameters())) and not any(p.requires_grad for p in parameters)
    ]


def hold_still(network: nn.Module) -> None:
    """Put frozen parts into evaluation mode: stored statistics that do not move, no dropout, no dropped paths."""
    for module in frozen_modules(network):
        module.eval()


def frozen_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Frozen parameters, and the buffers of frozen parts, by name."""
    still = {id(module) for module in frozen_modules(network)}
    tensors: dict[str, Tensor] = {
        name: parameter.detach() for name, parameter in network.named_parameters() if not parameter.requires_grad
    }
    for prefix, module in network.named_modules():
        if id(module) in still:
            tensors |= {f"{prefix}.{name}".lstrip("."): buffer for name, buffer in module.named_buffers()}
    return tensors


def frozen_digest(network: nn.Module) -> str:
    """SHA-256 of all frozen tensors, bit by bit, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(frozen_tensors(network).items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
