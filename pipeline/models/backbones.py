"""From an architecture's name to a classifier, and to the preprocessing its weights expect.

Two kinds of name: one of our own networks (``resnet18``), or any timm classifier (``timm/convnext_tiny``).
"""

from typing import Any

from torch import nn

from pipeline.errors import UserError, near_matches
from pipeline.models.resnet import RESNETS

TIMM = "timm/"

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


def create_backbone(name: str, num_classes: int) -> nn.Module:
    """A freshly initialised network ending in a classifier with ``num_classes`` outputs.

    Args:
        name: an own architecture or ``timm/<model>``.
        num_classes: outputs of the head.

    Returns:
        A module that maps float images ``(N, C, H, W)`` to logits ``(N, num_classes)``.

    Raises:
        UserError: the name is unknown; near matches are named.
    """
    if name.startswith(TIMM):
        import timm

        backbone = timm.create_model(_known_timm_model(name), pretrained=False, num_classes=num_classes)
    else:
        backbone = RESNETS[_known_own(name)](num_classes=num_classes)
    # Some of timm's heads start with a scale that is meant for 1,000 classes; with two, the first logits would be in
    # the tens, and pretrained features would be torn up before the head has learned anything.
    head = backbone.get_submodule(head_name(backbone))
    if isinstance(head, nn.Linear):
        nn.init.normal_(head.weight, std=_HEAD_STD)
        nn.init.zeros_(head.bias)
    return backbone


def head_name(backbone: nn.Module) -> str:
    """The name of the classifier inside the network, such as ``fc``: its parameters start with it and a dot."""
    own = getattr(backbone, "head_name", None)
    if isinstance(own, str):
        return own
    classifier = backbone.pretrained_cfg.get("classifier")  # type: ignore[union-attr,operator]
    if not isinstance(classifier, str):
        found = "none" if classifier is None else f"{len(classifier)} ({', '.join(classifier)})"
        raise UserError(
            f"model.backbone: expected a network with one classifier, found {found}; choose another model or a variant "
            "without distillation heads."
        )
    return classifier


def default_preprocessing(name: str, tag: str | None = None) -> dict[str, Any]:
    """How images must be prepared for a backbone, from the records that come with the packages (no network).

    Args:
        name: an own architecture or ``timm/<model>``.
        tag: a timm model with tag (``resnet18.a1_in1k``) whose own record is wanted.

    Returns:
        Plain types: ``size`` (pixels, square), ``crop`` (share of the resized short side that is kept),
        ``interpolation``, ``mean`` and ``std`` (of pixels in [0, 1], per channel), ``channels``.
    """
    model = _known_timm_model(name) if name.startswith(TIMM) else _known_own(name)
    if tag is None and not name.startswith(TIMM):
        return dict(IMAGENET_PREPROCESSING)
    import timm

    record = timm.get_pretrained_cfg(tag if tag is not None else model)
    if record is None:
        return dict(IMAGENET_PREPROCESSING)
    return {
        "size": record.input_size[-1],
        "crop": min(1.0, record.crop_pct),  # a few records ask for a border around the picture; we have none
        "interpolation": record.interpolation,
        "mean": list(record.mean),
        "std": list(record.std),
        "channels": record.input_size[0],
    }


def _known_own(name: str) -> str:
    if name not in RESNETS:
        hint = near_matches(name, [*RESNETS, *(TIMM + own for own in RESNETS)])
        raise UserError(
            f"model.backbone: expected one of {', '.join(RESNETS)} or timm/<model>, found '{name}'; "
            f"{hint}set model.backbone to a known name."
        )
    return name


def _known_timm_model(name: str) -> str:
    import timm

    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        hint = near_matches(model, timm.list_models())
        raise UserError(
            f"model.backbone: expected a model of timm {timm.__version__}, found '{name}'; "
            f"{hint}set model.backbone to timm/<a known model>."
        )
    return model
