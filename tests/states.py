"""State dicts for the tests of weights, and what must hold of them."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.weights import load_pretrained

SMALL = "timm/test_resnet"  # half a million parameters, with norms and a head named `fc`
SMALL_TAG = "timm/test_resnet.r160_in1k"
CACHED_TAG = "timm/resnet18.a1_in1k"
PATIENCE_BOUND = 5.0  # seconds; timm itself would retry for about 50


def randomised(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with the network's keys and shapes, and values of its own in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.tensor(7)
        if key.endswith("num_batches_tracked")
        else torch.rand(value.shape, generator=generator) + 0.5
        for key, value in network.state_dict().items()
    }


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in found.items():
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value, expected[key]), key


def assert_refused(network: nn.Module, address: str, *named: str) -> str:
    """Loading is refused in one line that holds every given text, and has changed nothing."""
    before = snapshot(network)
    with pytest.raises(UserError) as caught:
        load_pretrained(network, address)
    assert_same(snapshot(network), before)
    message = str(caught.value)
    assert "\n" not in message
    for text in named:
        assert text in message
    return message
