"""Frozen means frozen: parameters keep their values, normalisations their statistics, whatever mode training sets.

``requires_grad=False`` alone is not enough: batch norms in train mode go on moving their running statistics, and
normalise by those of the batch.
"""

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.backbones import depth_groups, first_convolution

#: Share of the backbone's weights that the first stages have together, at most: of a ResNet the stem and one stage.
EARLY = 0.02
_COLOURS = 3


def early_parameters(network: nn.Module, share: bool | float = True) -> list[str]:
    """Names of the parameters of the first stages, which see what all pictures share: edges, colours, textures.

    Of a ResNet, the stem and the first stage have a hundredth of the weights and a third of the arithmetic. Few images
    teach them nothing that they do not know (Yosinski et al. 2014, https://arxiv.org/abs/1411.1792, figure 2; Lee et
    al. 2023, https://arxiv.org/abs/2210.11466, on when it is otherwise), and without their gradients a step takes a
    fifth less. With the second stage it is a sixteenth of the weights, and a third less.

    Args:
        network: from :func:`~pipeline.models.backbones.create_backbone`.
        share: of the backbone's weights that they may have together, in [0, 1); true: 0.02; false: none.

    Returns:
        An empty list where the first layer takes other channels than colours: what it sees is not what it has learned.

    Raises:
        UserError: the share is out of range.

    Example:
        >>> from pipeline.models.backbones import create_backbone
        >>> early = early_parameters(create_backbone("resnet18", 10))
        >>> early[0], early[-1], len(early)
        ('conv1.weight', 'layer1.1.bn2.bias', 15)
    """
    share = EARLY if share is True else float(share)
    if not 0 <= share < 1:
        raise UserError(f"finetuning.freeze_early: expected true, false or a share in [0, 1), found {share:g}.")
    first = first_convolution(network)
    if first is None or getattr(network.get_submodule(first), "in_channels", None) != _COLOURS:
        return []
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    stages = depth_groups(network, coarse=True)[:-1]
    left = share * sum(sizes[name] for stage in stages for name in stage)
    early: list[str] = []
    for stage in stages:
        left -= sum(sizes[name] for name in stage)
        if left < 0:
            break
        early += stage
    return early


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
