"""A classifier that answers by how near an image's features are to those of known images."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

#: The tensor of such a head whose shape says how many images it knows.
CENTRES = "centres"


class KernelHead(nn.Module):
    """Logits are weighted sums of a Gaussian kernel: linear in ``exp(-width / F * |z - centre|^2)``, one a centre.

    ``z`` are the features, standardised; so are the centres, which are features of training images. It stands where a
    linear classifier stood, and has its two parameters, ``weight`` and ``bias``.

    Args:
        centres: how many.
        in_features: ``F``.
        out_features: how many classes.

    Example:
        >>> head = KernelHead(centres=10, in_features=4, out_features=3)
        >>> head(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    centres: Tensor
    mean: Tensor
    deviation: Tensor
    width: Tensor

    def __init__(self, centres: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer(CENTRES, torch.zeros(centres, in_features))
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("deviation", torch.ones(in_features))
        self.register_buffer("width", torch.ones(()))
        self.weight = nn.Parameter(torch.zeros(out_features, centres))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(N, F)`` to logits ``(N, number of classes)``, in float32: small distances are differences of
        large squares."""
        if torch.is_autocast_enabled(features.device.type):
            with torch.autocast(features.device.type, enabled=False):
                return self._logits(features.float())
        return self._logits(features)

    def _logits(self, features: Tensor) -> Tensor:
        near = kernel((features - self.mean) / self.deviation, self.centres, self.width)
        return functional.linear(near, self.weight, self.bias)


def kernel(features: Tensor, centres: Tensor, width: Tensor | float) -> Tensor:
    """How near features are to centres, in (0, 1].

    Args:
        features: standardised, ``(N, F)``.
        centres: standardised, ``(M, F)``.
        width: per feature, above 0: the larger, the nearer counts as near.

    Returns:
        ``(N, M)``.

    Example:
        >>> kernel(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 1.0)
        tensor([[1.0000, 0.3679]])
    """
    squares = features.square().sum(1, keepdim=True) + centres.square().sum(1) - 2 * features @ centres.T
    return torch.exp(-width / features.shape[1] * squares.clamp_min(0))


def match_head(network: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Put a kernel head in the classifier's place where a state to be loaded has one.

    Args:
        network: whose classifier it is; changed in place.
        name: of the classifier.
        state: of the network, or of its classifier alone.
    """
    centres = state.get(f"{name}.{CENTRES}")
    head = network.get_submodule(name)
    if centres is None or (isinstance(head, KernelHead) and len(head.centres) == len(centres)):
        return
    fresh = KernelHead(len(centres), int(head.in_features), int(head.out_features))  # type: ignore[arg-type]
    network.set_submodule(name, fresh.to(head.weight.device))  # type: ignore[arg-type]
