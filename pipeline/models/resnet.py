"""Residual networks, written to be read beside the paper.

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016
(https://arxiv.org/abs/1512.03385): the building blocks of figures 2 and 5 and the ImageNet networks of table 1.

Parameter and buffer names are those of torchvision and timm (``conv1``, ``layer1.0.downsample.0``, ``fc`` ...),
so published state dicts load without renaming.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

Block = type["BasicBlock"] | type["Bottleneck"]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1 and halves it at stride 2.

    It has no bias: the batch normalisation after it has one (paper, section 3.4).
    """
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias: a linear map over channels at each (strided) position."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: figure 5, left; the block of ResNet-18 and -34.

    ``y = relu(F(x) + S(x))`` with ``F = norm(conv3x3(relu(norm(conv3x3(x)))))`` and ``S`` the shortcut
    (equations 1 and 2 of the paper).

    Args:
        in_channels: channels of the input.
        width: channels of both convolutions.
        stride: stride of the first convolution and of a projection shortcut.

    Shapes:
        ``(N, in_channels, H, W)`` to ``(N, width, ceil(H / stride), ceil(W / stride))``, float.
    """

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, width * self.expansion, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation that ends the residual branch."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution and a shortcut: figure 5, right; the block of ResNet-50, -101 and -152.

    The first 1x1 convolution reduces to ``width`` channels, the last restores ``4 * width``, so that the 3x3
    convolution works where channels are few. A stride sits in the 3x3 convolution ("v1.5", as in torchvision and
    timm; about half a point more accurate than the paper's place, the first 1x1:
    Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 5.1).

    Args:
        in_channels: channels of the input.
        width: channels of the 3x3 convolution.
        stride: stride of the 3x3 convolution and of a projection shortcut.

    Shapes:
        ``(N, in_channels, H, W)`` to ``(N, 4 * width, ceil(H / stride), ceil(W / stride))``, float.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, width * self.expansion)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_channels, width * self.expansion, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation that ends the residual branch."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut of a block: option B of the paper (section 3.3).

    The identity (None) where input and output have one shape, else a projection: a strided 1x1 convolution and a
    normalisation, ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.
    """
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class ResNet(nn.Module):
    """An ImageNet residual network: one column of table 1.

    A 7x7 stem and a max-pool divide the size by 4; four stages of blocks with 64, 128, 256 and 512 (times the
    block's expansion) channels follow, each after the first halving the size; the mean over positions feeds a
    linear classifier.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        depths: blocks in each of the four stages.
        num_classes: outputs of the classifier.
        in_channels: channels of the input images.

    Shapes:
        Images ``(N, in_channels, H, W)``, float, normalised as the weights ask for, H and W at least 32; logits
        ``(N, num_classes)``, float.

    Example:
        >>> model = ResNet(BasicBlock, (2, 2, 2, 2), num_classes=10)
        >>> model(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """

    head_name = "fc"

    def __init__(
        self, block: Block, depths: tuple[int, int, int, int], num_classes: int = 1000, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.num_features = 512 * block.expansion
        self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = stage(block, 64 * block.expansion, 128, depths[1], stride=2)
        self.layer3 = stage(block, 128 * block.expansion, 256, depths[2], stride=2)
        self.layer4 = stage(block, 256 * block.expansion, 512, depths[3], stride=2)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.num_features, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights.

        Convolutions as in He et al. 2015 (https://arxiv.org/abs/1502.01852, equation 10, by fan-out). The scale of
        each block's last normalisation starts at zero, so that every block starts as its shortcut (Goyal et al.
        2017, section 5.1).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(module.last_norm.weight)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)`` to the last stage's map ``(N, num_features, ~H/32, ~W/32)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, images: Tensor) -> Tensor:
        features = self.global_pool(self.forward_features(images))
        return self.fc(torch.flatten(features, 1))


def stage(block: Block, in_channels: int, width: int, depth: int, stride: int) -> nn.Sequential:
    """``depth`` blocks in a row (``conv2_x`` to ``conv5_x`` of table 1); the first may change size and channels.

    Shapes:
        ``(N, in_channels, H, W)`` to ``(N, width * block.expansion, ceil(H / stride), ceil(W / stride))``.
    """
    channels = width * block.expansion
    first = block(in_channels, width, stride)
    return nn.Sequential(first, *(block(channels, width) for _ in range(depth - 1)))


#: Name to constructor; each takes ``num_classes`` and ``in_channels``.
RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
}
