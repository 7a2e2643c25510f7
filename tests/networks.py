"""Networks with lively numbers, and a residual network of plain functions to hold them against."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import summary
from pipeline.models.family import FAMILY
from pipeline.models.resnet import Block, ResNet


def on_meta(name: str, num_classes: int = 1000, **options: int) -> ResNet:
    """A network of the family without memory, where only names and shapes matter."""
    network = summary.on_meta(partial(FAMILY[name], num_classes=num_classes, **options))
    assert isinstance(network, ResNet)
    return network


def lively(name: str, num_classes: int = 7) -> ResNet:
    """A network with every norm, its statistics and every bias away from where initialisation puts them.

    Residual branches stay weaker than shortcuts and statistics near those of images, so that the signal neither dies
    nor blows up in 50 blocks, in training or in evaluation.
    """
    network = on_meta(name, num_classes).to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.bias.normal_(0, 0.1, generator=generator)
        norm.reset_running_stats()
        norm.momentum = 1.0
    for module in network.modules():
        if isinstance(module, Block) and module.downsample is not None:
            module.last_norm.weight.mul_(0.15)
    network.train()(some_images(64, seed=3))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_mean.add_(torch.empty_like(norm.bias).normal_(0, 0.1, generator=generator))
        norm.running_var.add_(0.1).mul_(torch.empty_like(norm.bias).uniform_(0.7, 1.4, generator=generator))
        norm.num_batches_tracked.zero_()
    return network


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in tensors of their own."""
    return {key: value.clone() for key, value in state.items()}


def signature(network: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    """Names, shapes and types of the state dict, in its order."""
    return [(key, value.shape, value.dtype) for key, value in network.state_dict().items()]


def some_images(size: int, count: int = 2, seed: int = 1) -> Tensor:
    """Noise; the second image is brighter and of more contrast than the others."""
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    images[1] = 2 * images[1] + 1
    return images


def logits_and_gradient(network: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and what each pixel does to a sum of them that weighs every logit of every image differently."""
    images = images.clone().requires_grad_()
    logits = network(images)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((weights * logits).sum(), images)
    return logits.detach(), gradient


def assert_agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Logits and gradients differ by no more than 1e-5, and are of a size at which that says something."""
    (logits, gradient), (expected_logits, expected_gradient) = found, expected
    # Logits that hardly differ between images would agree however the network was wired.
    assert (expected_logits[0] - expected_logits[1]).abs().max() > 0.05
    assert 0.5 < expected_logits.abs().max() < 5
    assert (logits - expected_logits).abs().max() <= 1e-5
    # A pixel's share is small where there are many: such gradients are brought to the order of one.
    scale = expected_gradient.abs().max()
    assert 0.01 < scale < 5
    assert (expected_gradient.abs() > 1e-3 * scale).float().mean() > 0.7
    assert (gradient - expected_gradient).abs().max() / scale.clamp(max=1) <= 1e-5


def reference(
    state: dict[str, Tensor],
    depths: Sequence[int],
    *,
    training: bool,
    shortcut: str | None = "B",
    cifar: bool = False,
    keras: bool = False,
) -> Callable[[Tensor], Tensor]:
    """A residual network in functions alone, after the paper and ``keras.applications``, from a state dict.

    In training it moves the running statistics in ``state``, as a module would.
    """
    eps, momentum = (1.001e-5, 0.01) if keras else (1e-5, 0.1)

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        pad = weight.shape[-1] // 2
        return F.conv2d(F.pad(x, (pad, pad, pad, pad)), weight, state.get(f"{name}.bias"), stride)

    def norm(x: Tensor, name: str) -> Tensor:
        if training:
            state[f"{name}.num_batches_tracked"] += 1
        mean, var, weight, bias = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)

    def around(x: Tensor, name: str, channels: int, stride: int) -> Tensor | float:
        if shortcut is None:
            return 0.0
        if shortcut != "C" and (x.shape[1], stride) == (channels, 1):
            return x
        if shortcut == "A":
            x = x[:, :, ::stride, ::stride]
            zeros = torch.zeros(len(x), (channels - x.shape[1]) // 2, *x.shape[2:])
            return torch.cat([zeros, x, zeros], dim=1)
        return norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")

    def block(x: Tensor, name: str, stride: int) -> Tensor:
        count = 3 if f"{name}.conv3.weight" in state else 2
        y = x
        for number in range(1, count + 1):
            y = norm(conv(y, f"{name}.conv{number}", stride if number == 1 else 1), f"{name}.bn{number}")
            y = y.clamp(min=0) if number < count else y
        return (y + around(x, name, y.shape[1], stride)).clamp(min=0)

    def network(images: Tensor) -> Tensor:
        x = norm(conv(images, "conv1", 1 if cifar else 2), "bn1").clamp(min=0)
        if not cifar:
            x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
        for layer, depth in enumerate(depths, start=1):
            for number in range(depth):
                x = block(x, f"layer{layer}.{number}", 2 if layer > 1 and number == 0 else 1)
        head = "linear" if cifar else "fc"
        return x.mean((2, 3)) @ state[f"{head}.weight"].T + state[f"{head}.bias"]

    return network
