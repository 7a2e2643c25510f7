"""The residual networks by name: which parts of ``resnet`` make which network.

Names are timm's and torchvision's where these have the network.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from pipeline.models.resnet import (
    BasicBlock,
    Block,
    Bottleneck,
    ResNet,
    SqueezeExcitation,
    cifar_stem,
    deep_stem,
    identity_or,
    imagenet_stem,
    no_shortcut,
    option_a,
    option_c,
    option_d,
    projection,
)

Stages = tuple[tuple[int, int], ...]

# Blocks in conv2_x to conv5_x: table 1 of the paper. 18 and 34 have basic blocks, the deeper ones bottlenecks.
_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)


def _imagenet(layers: int) -> Stages:
    return tuple(zip(_DEPTHS[layers], (64, 128, 256, 512), strict=True))


def _block(layers: int) -> type[BasicBlock] | type[Bottleneck]:
    return BasicBlock if layers < 50 else Bottleneck


def _cifar(layers: int, **block: object) -> Callable[..., ResNet]:
    # Section 4.2: 2n layers in each of three stages, a stem and a classifier make 6n + 2.
    n = (layers - 2) // 6
    made: Callable[..., Block] = partial(BasicBlock, **block)  # type: ignore[arg-type]
    return partial(ResNet, made, ((n, 16), (n, 32), (n, 64)), stem=cifar_stem, head_name="linear")


def keras_resnet(
    layers: int, num_classes: int, in_channels: int = 3, dropout: float = 0.0, head_stages: int = 1
) -> ResNet:
    """A bottleneck network in the layout of ``keras.applications``.

    Strides as in the paper (v1), biases in the convolutions, and the constants of Keras' normalisation.

    Args:
        layers: 50, 101 or 152.
        num_classes: outputs of the classifier.
        in_channels: channels of the input images.
        dropout: as in :class:`~pipeline.models.resnet.ResNet`.
        head_stages: as there.
    """
    biased = identity_or(partial(projection, bias=True))
    block = partial(Bottleneck, stride_first=True, bias=True, shortcut=biased)
    stem = partial(imagenet_stem, bias=True)
    network = ResNet(block, _imagenet(layers), num_classes, in_channels, stem, dropout, head_stages=head_stages)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1.001e-5, 0.01  # Keras counts the momentum from the other end: 0.99
    return network


#: Name to constructor; each takes ``num_classes``, ``in_channels``, ``dropout`` and ``head_stages``.
FAMILY: dict[str, Callable[..., ResNet]] = {
    **{f"resnet{n}": partial(ResNet, _block(n), _imagenet(n)) for n in _DEPTHS},
    # ResNeXt: table 1 of its paper for 50 layers; 101 layers as published by its authors and by torchvision.
    "resnext50_32x4d": partial(ResNet, partial(Bottleneck, groups=32, group_width=4), _imagenet(50)),
    "resnext101_32x8d": partial(ResNet, partial(Bottleneck, groups=32, group_width=8), _imagenet(101)),
    "resnext101_64x4d": partial(ResNet, partial(Bottleneck, groups=64, group_width=4), _imagenet(101)),
    "wide_resnet50_2": partial(ResNet, partial(Bottleneck, group_width=128), _imagenet(50)),
    "wide_resnet101_2": partial(ResNet, partial(Bottleneck, group_width=128), _imagenet(101)),
    **{
        f"resnet{n}d": partial(ResNet, partial(_block(n), shortcut=option_d), _imagenet(n), stem=deep_stem)
        for n in _DEPTHS
    },
    **{f"seresnet{n}": partial(ResNet, partial(_block(n), gate=SqueezeExcitation), _imagenet(n)) for n in _DEPTHS},
    "seresnext50_32x4d": partial(
        ResNet, partial(Bottleneck, groups=32, group_width=4, gate=SqueezeExcitation), _imagenet(50)
    ),
    # The original places of the strides, and what Keras made of them.
    **{f"resnet{n}_v1": partial(ResNet, partial(Bottleneck, stride_first=True), _imagenet(n)) for n in (50, 101, 152)},
    **{f"resnet{n}_keras": partial(keras_resnet, n) for n in (50, 101, 152)},
    # Shortcuts of table 3 (option B is `resnet34`), and the plain networks of figures 3 and 4.
    "resnet34_a": partial(ResNet, partial(BasicBlock, shortcut=option_a), _imagenet(34)),
    "resnet34_c": partial(ResNet, partial(BasicBlock, shortcut=option_c), _imagenet(34)),
    **{f"plain{n}": partial(ResNet, partial(BasicBlock, shortcut=no_shortcut), _imagenet(n)) for n in (18, 34)},
    # Section 4.2 and table 6, with option A as there, or with projections; the plain ones of figure 6, left.
    **{f"resnet{n}": _cifar(n, shortcut=option_a) for n in _CIFAR_DEPTHS},
    **{f"resnet{n}_b": _cifar(n) for n in _CIFAR_DEPTHS},
    **{f"plain{n}": _cifar(n, shortcut=no_shortcut) for n in _CIFAR_DEPTHS[:4]},
}

#: The networks made for images of 32 pixels.
CIFAR_FAMILY = frozenset(
    name for name, make in FAMILY.items() if isinstance(make, partial) and make.keywords.get("stem") is cifar_stem
)
