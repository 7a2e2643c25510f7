"""What a network costs: layers, parameters and multiply-adds, counted on the network itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.models.family import CIFAR_FAMILY, FAMILY


def count_parameters(network: nn.Module) -> int:
    """Number of trainable and frozen parameters; running statistics do not count."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_layers(network: nn.Module) -> int:
    """Layers with weights from the image to the logits, as the paper counts them: projections do not count."""
    return sum(
        isinstance(module, nn.Conv2d | nn.Linear) and ".downsample." not in name and ".se." not in name
        for name, module in network.named_modules()
    )


def multiply_adds(network: nn.Module, size: int, channels: int = 3) -> int:
    """Multiplications and additions of one image through all convolutions and linear layers, a pair counted once.

    That is how the paper's table 1 counts FLOPs. Works on networks without data (``torch.device("meta")``), too.

    Args:
        network: in any mode; left in evaluation mode.
        size: height and width of the image in pixels.
        channels: of the image.

    Example:
        >>> with torch.device("meta"):
        ...     network = FAMILY["resnet18"](num_classes=1000)
        >>> f"{multiply_adds(network, 224) / 1e9:.3f} billion"
        '1.814 billion'
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        # Each weight is used once for each position of the output; a linear layer has one position.
        positions = output.shape[2:].numel() if isinstance(module, nn.Conv2d) else 1
        total += module.weight.numel() * positions

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            # A batch of no images: the shapes are those of one, and nothing is computed.
            network.eval()(torch.zeros(0, channels, size, size, device=next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return total


def family_table() -> str:
    """The residual networks by name, a Markdown table: layers, parameters, multiply-adds."""
    rows = [("name", "layers", "parameters", "multiply-adds", "image", "classes")]
    for name, make in FAMILY.items():
        size, classes = (32, 10) if name in CIFAR_FAMILY else (224, 1000)
        # In memory, which is never touched: without, each operation on shapes takes a millisecond.
        network = on_meta(partial(make, num_classes=classes)).to_empty(device="cpu")
        rows.append(
            (
                f"`{name}`",
                f"{count_layers(network)}",
                f"{count_parameters(network):,}",
                f"{multiply_adds(network, size) / 1e6:,.0f} M",
                f"{size} px",
                f"{classes:,}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(_aligned(row, widths)) + " |" for row in rows]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A network without data: shapes alone, at once and in no memory."""
    with torch.device("meta"), _Undrawn():
        return make()


class _Undrawn(TorchFunctionMode):
    """Fills no tensor with random numbers, which without data takes most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    first, *numbers = row
    return [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))]
