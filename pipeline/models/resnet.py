"""Residual networks, written to be read beside the papers.

* K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016
  (https://arxiv.org/abs/1512.03385), "the paper" below: the blocks of figures 2 and 5, the shortcuts A, B and C and
  the plain networks of section 4.1, the ImageNet networks of table 1, the CIFAR networks of section 4.2.
* S. Xie et al., "Aggregated Residual Transformations", CVPR 2017 (https://arxiv.org/abs/1611.05431): ResNeXt.
* S. Zagoruyko, N. Komodakis, "Wide Residual Networks", BMVC 2016 (https://arxiv.org/abs/1605.07146).
* T. He et al., "Bag of Tricks", CVPR 2019 (https://arxiv.org/abs/1812.01187), figure 2: ResNet-D.
* J. Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018 (https://arxiv.org/abs/1709.01507).

A network is put together from three kinds of part, each a function or a class of its own: a **stem** that takes the
image, a **block** that is repeated, and the **shortcut** around each block. ``family`` names the combinations.

Parameter and buffer names are those of torchvision and timm (``conv1``, ``layer1.0.downsample.0``, ``fc`` ...), so
published state dicts load without renaming. In shapes below, N is the batch, H and W are height and width, and
``ceil(H / s)`` is what a stride s leaves of H.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Makes the shortcut around a block of ``(in_channels, out_channels, stride)``; None: the block has none.
Shortcut = Callable[[int, int, int], nn.Module | None]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1 and halves it at stride 2.

    It needs no bias: the batch normalisation after it has one (paper, section 3.4).
    """
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, groups=groups, bias=bias)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 1x1 convolution: a linear map over channels at each (strided) position."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=bias)


# Shortcuts: from ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.


class ZeroPadding(nn.Module):
    """Option A: every ``stride``-th position, and channels of zeros added on both sides; no parameters.

    Half of the new channels come before, half behind, as in the published CIFAR weights; an odd one comes behind.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"expected at least the {in_channels} channels of the input, found {out_channels}")
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def projection(in_channels: int, out_channels: int, stride: int, bias: bool = False) -> nn.Module:
    """Option C, ``W_s x`` of equation 2: a strided 1x1 convolution and a normalisation around every block."""
    return nn.Sequential(conv1x1(in_channels, out_channels, stride, bias), nn.BatchNorm2d(out_channels))


def averaged_projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The projection of ResNet-D: mean of ``stride x stride`` positions, where a strided 1x1 drops three of four."""
    pool = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, conv1x1(in_channels, out_channels), nn.BatchNorm2d(out_channels))


def identity_or(change: Shortcut) -> Shortcut:
    """The identity, equation 1, where input and output have one shape; ``change`` where they differ."""

    def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
        same = stride == 1 and in_channels == out_channels
        return nn.Identity() if same else change(in_channels, out_channels, stride)

    return shortcut


def no_shortcut(in_channels: int, out_channels: int, stride: int) -> None:
    """Makes a plain network: section 3.3 and the left side of figure 3."""


option_a = identity_or(ZeroPadding)
option_b = identity_or(projection)
option_c: Shortcut = projection
option_d = identity_or(averaged_projection)


# Blocks


class SqueezeExcitation(nn.Module):
    """Weighs each channel, in (0, 1), by what all channels hold on average: figure 2 of its paper.

    ``(N, channels, H, W)`` to the same shape. Between the two linear maps are a sixteenth of the channels, to the
    nearest multiple of 8 (timm's rule, which matters for widths that the paper does not have).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(8, int(channels / 16 + 4) // 8 * 8)
        self.fc1 = conv1x1(channels, squeezed, bias=True)
        self.fc2 = conv1x1(squeezed, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Block(nn.Module, ABC):
    """A residual building block: ``y = relu(F(x) + S(x))``, equations 1 and 2 and figure 2 of the paper.

    A subclass builds the branch ``F`` and runs it in :meth:`residual`; ``S`` is the shortcut, under the name that
    torchvision and timm have for it. A plain block has none: ``y = relu(F(x))``.

    Attributes:
        out_channels: channels of the output.
        downsample: the shortcut, or None.
    """

    out_channels: int
    downsample: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    @property
    @abstractmethod
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation that ends the branch."""

    @abstractmethod
    def residual(self, x: Tensor) -> Tensor:
        """The branch, before the sum: ``(N, in_channels, H, W)`` to the shape of the output."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.residual(x)
        return self.relu(y if self.downsample is None else y + self.downsample(x))


class BasicBlock(Block):
    """Two 3x3 convolutions: figure 5, left; the block of ResNet-18 and -34 and of the CIFAR networks.

    ``F = norm(conv3x3(relu(norm(conv3x3(x)))))``.

    Args:
        in_channels: channels of the input.
        width: channels of both convolutions and of the output.
        stride: of the first convolution and of the shortcut.
        shortcut: the way around.
        gate: makes a module that weighs the channels of the branch, such as :class:`SqueezeExcitation`.

    Shapes:
        ``(N, in_channels, H, W)`` to ``(N, width, ceil(H / stride), ceil(W / stride))``, float.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        shortcut: Shortcut = option_b,
        gate: Callable[[int], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.out_channels = width
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = gate(width)
        self.downsample = shortcut(in_channels, width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.se(self.bn2(self.conv2(x)))


class Bottleneck(Block):
    """A 1x1, a 3x3 and a 1x1 convolution: figure 5, right; the block of ResNet-50, -101 and -152.

    ``F = norm(conv1x1(relu(norm(conv3x3(relu(norm(conv1x1(x))))))))``. The first 1x1 reduces the channels for the
    costly 3x3, the last gives four times ``width``.

    A stride sits in the 3x3 ("v1.5", as in torchvision and timm; about half a point more accurate: Goyal et al.
    2017, https://arxiv.org/abs/1706.02677, section 5.1) or, as in the paper and Keras ("v1"), in the first 1x1.

    With ``groups`` the 3x3 is ResNeXt's split-transform-merge in its form 3c: that many convolutions side by side, each
    on ``group_width`` channels at width 64 (table 1 of that paper: 32x4d is ``groups=32, group_width=4``). One group
    of width 128 is the wide network's 3x3 with twice the channels.

    Args:
        in_channels: channels of the input.
        width: a quarter of the channels of the output; channels of the 3x3 for one group of width 64.
        stride: of one convolution (see ``stride_first``) and of the shortcut.
        groups: groups of the 3x3.
        group_width: channels of each group where ``width`` is 64; grows with it.
        stride_first: True for v1, False for v1.5.
        bias: whether convolutions have biases of their own, as in Keras.
        shortcut: the way around.
        gate: makes a module that weighs the channels of the branch, such as :class:`SqueezeExcitation`.

    Shapes:
        ``(N, in_channels, H, W)`` to ``(N, 4 * width, ceil(H / stride), ceil(W / stride))``, float.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        *,
        groups: int = 1,
        group_width: int = 64,
        stride_first: bool = False,
        bias: bool = False,
        shortcut: Shortcut = option_b,
        gate: Callable[[int], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.out_channels = 4 * width
        inner = groups * (width * group_width // 64)
        first, second = (stride, 1) if stride_first else (1, stride)
        self.conv1 = conv1x1(in_channels, inner, first, bias)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, second, groups, bias)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, 4 * width, bias=bias)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.se = gate(4 * width)
        self.downsample = shortcut(in_channels, 4 * width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def residual(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.se(self.bn3(self.conv3(x)))


# Stems


class Stem(NamedTuple):
    """What takes the image: ``relu(norm(conv(image)))``, then ``pool``."""

    conv: nn.Module
    channels: int
    pool: nn.Module


def imagenet_stem(in_channels: int, bias: bool = False) -> Stem:
    """``conv1`` and the max-pool of table 1: a 7x7 convolution, size divided by 4, 64 channels."""
    conv = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=bias)
    return Stem(conv, 64, nn.MaxPool2d(kernel_size=3, stride=2, padding=1))


def deep_stem(in_channels: int) -> Stem:
    """ResNet-C and -D: three 3x3 convolutions (32, 32, 64 channels) see as far as the 7x7, with two more relus."""
    conv = nn.Sequential(
        conv3x3(in_channels, 32, stride=2), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
        conv3x3(32, 32), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
        conv3x3(32, 64),
    )  # fmt: skip
    return Stem(conv, 64, nn.MaxPool2d(kernel_size=3, stride=2, padding=1))


def cifar_stem(in_channels: int) -> Stem:
    """Section 4.2: one 3x3 convolution with 16 channels at full size, for images of 32 pixels."""
    return Stem(conv3x3(in_channels, 16), 16, nn.Identity())


# The network


class ResNet(nn.Module):
    """A residual (or plain) network: a stem, stages of blocks, the mean over positions, and a linear classifier.

    Each stage after the first halves the size. With the ImageNet stem and four stages it is a column of table 1 of
    the paper, with the CIFAR stem and three stages of 16, 32 and 64 channels a network of section 4.2.

    Args:
        block: called with ``(in_channels, width, stride)``: :class:`BasicBlock`, :class:`Bottleneck`, or one of them
            with more arguments bound by ``functools.partial``.
        stages: ``(number of blocks, width)`` of each stage.
        num_classes: outputs of the classifier.
        in_channels: channels of the input images.
        stem: what takes the image.
        dropout: share of the features that are zeroed before the classifier while training, in [0, 1).
        head_name: name of the classifier; the published CIFAR weights call it ``linear``.
        head_stages: how many of the stages, the last ones, the classifier sees, each by the mean of its map. The paper
            has one. Evci et al. 2022 (https://arxiv.org/abs/2201.03529) found earlier stages to know what the last
            has dropped because it did not matter in pretraining.

    Shapes:
        Images ``(N, in_channels, H, W)``, float, normalised as the weights ask for, H and W at least 32; logits
        ``(N, num_classes)``, float.

    Raises:
        ValueError: ``head_stages`` is not between 1 and the number of stages.

    Example:
        >>> model = ResNet(Bottleneck, ((1, 64), (1, 128), (2, 256), (1, 512)), num_classes=10)
        >>> model(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        block: Callable[[int, int, int], Block],
        stages: Sequence[tuple[int, int]],
        num_classes: int,
        in_channels: int = 3,
        stem: Callable[[int], Stem] = imagenet_stem,
        dropout: float = 0.0,
        head_name: str = "fc",
        head_stages: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= head_stages <= len(stages):
            raise ValueError(f"expected a head that sees 1 to {len(stages)} stages, found {head_stages}")
        self.conv1, channels, pool = stem(in_channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = pool
        self.stage_names = [f"layer{number}" for number in range(1, len(stages) + 1)]
        widths: list[int] = []
        for name, (depth, width) in zip(self.stage_names, stages, strict=True):
            layer = stage(block, channels, width, depth, stride=1 if name == "layer1" else 2)
            self.add_module(name, layer)
            channels = layer[-1].out_channels  # type: ignore[assignment]
            widths.append(channels)
        self.dropout = nn.Dropout(dropout)
        #: Channels of the last map.
        self.num_features = channels
        self.head_name = head_name
        #: How many stages the classifier sees.
        self.head_stages = head_stages
        #: Features that it sees of each of them.
        self.head_widths = widths[-head_stages:]
        #: Name of the convolution that takes the image.
        self.first_convolution = "conv1.0" if isinstance(self.conv1, nn.Sequential) else "conv1"
        self.add_module(head_name, nn.Linear(sum(self.head_widths), num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights.

        Convolutions as in He et al. 2015 (https://arxiv.org/abs/1502.01852, equation 10, by fan-out). Where there is
        a shortcut, the scale of the block's last normalisation starts at zero, so that every block starts as its
        shortcut (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 5.1).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Block) and module.downsample is not None:
                nn.init.zeros_(module.last_norm.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)`` to the last stage's map, ``(N, num_features, ~H/32, ~W/32)`` for four."""
        return self.forward_intermediates(images, indices=1)[0]

    def forward_intermediates(self, images: Tensor, indices: int) -> tuple[Tensor, list[Tensor]]:
        """What :meth:`forward_features` gives, and the maps of the last ``indices`` stages (the name is timm's)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps: list[Tensor] = []
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
            maps = [*maps, x][-indices:]  # earlier ones are not held in memory
        return x, maps

    def forward_head(self, maps: Tensor | Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Maps to logits, or with ``pre_logits`` to what logits are made of, their means side by side.

        Args:
            maps: of the last ``head_stages`` stages or more, ``(N, C, h, w)`` each, from low to high; of the last
                stage alone, its map will do.
            pre_logits: features instead of logits.

        Returns:
            ``(N, num_classes)``, or features ``(N, F)``.
        """
        seen = [maps] if isinstance(maps, Tensor) else maps[-self.head_stages :]
        features = self.dropout(torch.cat([stage_map.mean((2, 3)) for stage_map in seen], dim=1))
        return features if pre_logits else self.get_submodule(self.head_name)(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_intermediates(images, self.head_stages)[1])

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of names by depth, as timm's networks give them: stem, then blocks (``coarse``: stages)."""
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)\." if coarse else r"^layer(\d+)\.(\d+)\."}


def stage(
    block: Callable[[int, int, int], Block], in_channels: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    """``depth`` blocks in a row (``conv2_x`` to ``conv5_x`` of table 1); the first may change size and channels.

    Shapes:
        ``(N, in_channels, H, W)`` to ``(N, out_channels of the block, ceil(H / stride), ceil(W / stride))``.
    """
    first = block(in_channels, width, stride)
    return nn.Sequential(first, *(block(first.out_channels, width, 1) for _ in range(depth - 1)))
