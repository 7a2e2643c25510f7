"""From an architecture's name to a classifier, to the preprocessing it expects, and to its parts.

Two kinds of name: a network of our own ``family`` (``resnet18``), or any timm classifier (``timm/convnext_tiny``). What
comes out answers to the same functions here, whichever it is: :func:`head_name`, :func:`features`, :func:`describe`,
:func:`spatial_map` and :func:`depth_groups`. Strategies, caches, saliency and export rely on these alone.
"""

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError, near_matches
from pipeline.models.family import CIFAR_FAMILY, FAMILY
from pipeline.models.modes import evaluating
from pipeline.models.resnet import ResNet
from pipeline.models.wide_head import SeesSeveralStages, tells_stages, widen_head

TIMM = "timm/"
#: Stages that are described, and that a head can see: earlier ones know edges and colours alone.
LAST_STAGES = 3

_HEAD_STD = 0.01  # as for the linear layers of AlexNet and, in torchvision, of MobileNet and EfficientNet

#: How images were prepared for the ImageNet weights of our own networks, where a file says nothing else:
#: evaluation as in the ResNet paper (short side 256, centre crop 224), statistics as published by torchvision.
IMAGENET_PREPROCESSING: dict[str, Any] = {
    "size": 224,
    "crop": 0.875,
    "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "channels": 3,
}
#: The same for the networks of 32 pixels: whole images, as the paper tests on CIFAR; statistics as above, with which
#: the published weights (akamaster/pytorch_resnet_cifar10) were trained.
CIFAR_PREPROCESSING: dict[str, Any] = {**IMAGENET_PREPROCESSING, "size": 32, "crop": 1.0}


def create_backbone(
    name: str, num_classes: int, in_channels: int = 3, dropout: float = 0.0, head_stages: int = 1
) -> nn.Module:
    """A freshly initialised network ending in a classifier with ``num_classes`` outputs.

    Args:
        name: an own architecture or ``timm/<model>``.
        num_classes: outputs of the head.
        in_channels: channels of the images.
        dropout: share of the features zeroed before the head while training, in [0, 1).
        head_stages: how many of the last stages the head sees (see :func:`most_head_stages`).

    Returns:
        A module that maps float images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``.

    Raises:
        UserError: the name is unknown (near matches are named), or its head cannot see so many stages.
    """
    if name.startswith(TIMM):
        import timm

        own_dropout = dropout if head_stages == 1 else 0.0
        network = timm.create_model(
            known_timm_model(name),
            pretrained=False,
            num_classes=num_classes,
            in_chans=in_channels,
            drop_rate=own_dropout,
        )
        if head_stages != 1:
            _require_stages(name, head_stages, most_head_stages(network, in_channels))
            widen_head(network, head_name(network), head_stages, dropout)
    else:
        _require_stages(name, head_stages, LAST_STAGES)
        network = FAMILY[_known_own(name)](
            num_classes=num_classes, in_channels=in_channels, dropout=dropout, head_stages=head_stages
        )
    # Some of timm's heads start with a scale that is meant for 1,000 classes; with two, the first logits would be in
    # the tens, and pretrained features would be torn up before the head has learned anything.
    head = network.get_submodule(head_name(network))
    if isinstance(head, nn.Linear):
        nn.init.normal_(head.weight, std=_HEAD_STD)
        nn.init.zeros_(head.bias)
    return network


def has_linear_head(network: nn.Module, channels: int = 3) -> bool:
    """Whether the network's logits are linear in its features, so that a head can be solved.

    A few of timm's networks end in a linear layer, and change what timm calls their features in front of it.

    Args:
        network: from :func:`create_backbone`.
        channels: of its images.
    """
    head = network.get_submodule(head_name(network))
    if not isinstance(head, nn.Linear) or isinstance(network, ResNet | SeesSeveralStages):
        return isinstance(head, nn.Linear)
    side = timm_preprocessing(network.pretrained_cfg)["size"]  # type: ignore[arg-type]  # some networks take no other
    images = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with evaluating(network), torch.inference_mode(), hook:
        maps = network.forward_features(images.to(head.weight.device))  # type: ignore[operator]
        network.forward_head(maps)  # type: ignore[operator]
        # Bit by bit: a batch normalisation that has seen nothing yet changes next to nothing.
        return seen[0].equal(network.forward_head(maps, pre_logits=True))  # type: ignore[operator]


def most_head_stages(network: nn.Module, channels: int = 3) -> int:
    """How many of a network's last stages a head can see.

    Of timm's networks more than one where they are stages, with maps of several sizes, and the head is linear.

    Args:
        network: from :func:`create_backbone`.
        channels: of its images.

    Example:
        >>> most_head_stages(create_backbone("timm/test_efficientnet", 10))
        3
        >>> most_head_stages(create_backbone("timm/test_vit", 10))  # blocks, not stages
        1
    """
    if isinstance(network, ResNet | SeesSeveralStages):
        return LAST_STAGES
    return LAST_STAGES if tells_stages(network, LAST_STAGES) and has_linear_head(network, channels) else 1


def _require_stages(name: str, wanted: int, most: int) -> None:
    if not 1 <= wanted <= most:
        expected = "1" if most == 1 else f"1 to {most}"
        raise UserError(f"model.head_stages: expected {expected} for '{name}', found {wanted}; leave it out.")


def head_name(network: nn.Module) -> str:
    """The name of the classifier inside the network, such as ``fc``: its parameters start with it and a dot."""
    own = getattr(network, "head_name", None)
    if isinstance(own, str):
        return own
    classifier = network.pretrained_cfg.get("classifier")  # type: ignore[union-attr,operator]
    if not isinstance(classifier, str):
        found = "none" if classifier is None else f"{len(classifier)} ({', '.join(classifier)})"
        raise UserError(
            f"model.backbone: expected a network with one classifier, found {found}; choose another model or a variant "
            "without distillation heads."
        )
    return classifier


def first_convolution(network: nn.Module) -> str | None:
    """The name of the layer that takes the image, such as ``conv1``; None where timm does not know one."""
    own = getattr(network, "first_convolution", None)
    name = own if isinstance(own, str) else network.pretrained_cfg.get("first_conv")  # type: ignore[union-attr,operator]
    return name if isinstance(name, str) else None


def features(network: nn.Module, images: Tensor) -> Tensor:
    """What the head classifies.

    Args:
        network: from :func:`create_backbone`.
        images: normalised, float ``(N, C, H, W)``.

    Returns:
        Float ``(N, F)``. In evaluation the head, where it is linear, makes the logits of it, but of the few networks of
        timm that normalise it before.
    """
    stages = _head_stages(network)
    if stages == 1:
        seen = network.forward_features(images)  # type: ignore[operator]
    else:
        last, maps = network.forward_intermediates(images, indices=stages)  # type: ignore[operator]
        seen = _seen_by_head(last, maps, stages)
    return network.forward_head(seen, pre_logits=True)  # type: ignore[operator]


def feature_widths(network: nn.Module) -> list[int] | None:
    """How many of the :func:`features` are of each stage, in order; None where they are all of one."""
    return getattr(network, "head_widths", None)


def describe(network: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and on the way to them what the last stages make of an image.

    Args:
        network: from :func:`create_backbone`.
        images: normalised, float ``(N, C, H, W)``.

    Returns:
        Logits ``(N, number of classes)``, and of the last three stages (of a transformer: blocks) the means of their
        maps, ``(N, F)`` each, from low to high; of the few networks of timm that do not tell, what the head classifies.

    Example:
        >>> import torch
        >>> network = create_backbone("resnet18", 10).eval()
        >>> logits, stages = describe(network, torch.zeros(1, 3, 64, 64))
        >>> [stage.shape[1] for stage in stages]
        [128, 256, 512]
    """
    if not hasattr(network, "forward_intermediates"):
        last = network.forward_features(images)  # type: ignore[operator]
        return network.forward_head(last), [network.forward_head(last, pre_logits=True)]  # type: ignore[operator]
    last, maps = network.forward_intermediates(images, indices=LAST_STAGES)  # type: ignore[operator]
    seen = _seen_by_head(last, maps, _head_stages(network))
    return network.forward_head(seen), [stage.mean((2, 3)) for stage in maps]  # type: ignore[operator]


def described_by_head(name: str, stages: int) -> bool:
    """Whether a head that sees so many stages classifies just what :func:`describe` tells.

    It does where it sees all of them; of timm's networks, many have more layers between the last map and the head.

    Args:
        name: an own architecture or ``timm/<model>``.
        stages: seen by the head.
    """
    return stages == LAST_STAGES and not name.startswith(TIMM)


def _head_stages(network: nn.Module) -> int:
    return int(getattr(network, "head_stages", 1))


def _seen_by_head(last: Tensor, maps: list[Tensor], stages: int) -> Tensor | list[Tensor]:
    """What ``forward_head`` takes; what it takes of the last stage need not be that stage's map."""
    return last if stages == 1 else [*maps[:-1], last]


def spatial_map(network: nn.Module, maps: Tensor) -> Tensor:
    """Positions as in the image: what ``forward_features`` made of square images, or a gradient of that shape.

    Args:
        network: from :func:`create_backbone`.
        maps: ``(N, C, h, w)`` of a convolutional network, ``(N, h, w, C)`` where the network says so, or the tokens
            ``(N, prefix + h * w, C)`` of a transformer.

    Returns:
        A view ``(N, C, h, w)``.

    Raises:
        UserError: the network gives no map: several of them, or a summary alone.
    """
    if isinstance(maps, Tensor) and maps.ndim == 3:
        patches = maps[:, getattr(network, "num_prefix_tokens", 0) :]
        side = math.isqrt(patches.shape[1])
        if side > 1 and side**2 == patches.shape[1]:
            return patches.transpose(1, 2).unflatten(2, (side, side))
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        found = type(maps).__name__ if not isinstance(maps, Tensor) else f"shape {tuple(maps.shape)}"
        raise UserError(
            f"model.backbone: expected a network whose last features have a place in the image, found {found} from "
            f"{type(network).__name__}; choose another backbone."
        )
    return maps.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else maps


def depth_groups(network: nn.Module, coarse: bool = False) -> list[list[str]]:
    """Names of all parameters, grouped by depth: the stem first, the head last.

    Args:
        network: from :func:`create_backbone`.
        coarse: groups of stages instead of blocks.

    Example:
        >>> groups = depth_groups(create_backbone("resnet18", 10), coarse=True)
        >>> [len(names) for names in groups]  # stem, four stages, head
        [3, 12, 15, 15, 15, 2]
        >>> groups[-1]
        ['fc.weight', 'fc.bias']
    """
    from timm.models import group_parameters

    names = [name for name, _ in network.named_parameters()]
    # A few of timm's networks do not tell what lies how deep: all but their head is one group.
    tells = hasattr(network, "group_matcher")
    by_depth = group_parameters(network, network.group_matcher(coarse=coarse)) if tells else {0: names}  # type: ignore[operator]
    head = f"{head_name(network)}."
    groups = [[name for name in by_depth[depth] if not name.startswith(head)] for depth in sorted(by_depth)]
    return [*filter(None, groups), [name for name in names if name.startswith(head)]]


def default_preprocessing(name: str) -> dict[str, Any]:
    """How images must be prepared for a backbone whose weights say nothing else (no network is needed).

    Args:
        name: an own architecture or ``timm/<model>``.

    Returns:
        Plain types: ``size`` (pixels, square), ``crop`` (share of the resized short side that is kept),
        ``interpolation``, ``mean`` and ``std`` (of pixels in [0, 1], per channel), ``channels``.
    """
    if not name.startswith(TIMM):
        return deepcopy(CIFAR_PREPROCESSING if _known_own(name) in CIFAR_FAMILY else IMAGENET_PREPROCESSING)
    import timm

    record = timm.get_pretrained_cfg(known_timm_model(name))
    return deepcopy(IMAGENET_PREPROCESSING) if record is None else timm_preprocessing(record.to_dict())


def timm_preprocessing(record: dict[str, Any]) -> dict[str, Any]:
    """The preprocessing in a ``pretrained_cfg`` of timm, as :func:`default_preprocessing` returns it."""
    default = IMAGENET_PREPROCESSING
    channels, size, _ = record.get("input_size") or (3, default["size"], default["size"])
    mean, std = (default["mean"], default["std"]) if channels == 3 else ([0.5] * channels, [0.5] * channels)
    return {
        "size": size,
        "crop": min(1.0, record.get("crop_pct") or default["crop"]),  # a few ask for a border; we have none
        "interpolation": record.get("interpolation") or default["interpolation"],
        "mean": list(record.get("mean") or mean),
        "std": list(record.get("std") or std),
        "channels": channels,
    }


def _known_own(name: str) -> str:
    if name not in FAMILY:
        hint = near_matches(name, [*FAMILY, *(TIMM + own for own in FAMILY)])
        raise UserError(
            f"model.backbone: expected one of the names that `python -m pipeline backbones` lists or timm/<model>, "
            f"found '{name}'; {hint}set model.backbone to a known name."
        )
    return name


def known_timm_model(name: str) -> str:
    """The model's name without its prefix.

    Raises:
        UserError: timm has no such model; near matches are named.
    """
    import timm

    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        hint = near_matches(model, timm.list_models())
        raise UserError(
            f"model.backbone: expected a model of timm {timm.__version__}, found '{name}'; "
            f"{hint}set model.backbone to timm/<a known model>."
        )
    return model
