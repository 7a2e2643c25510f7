"""Networks whose normalisations are part of their convolutions answer as before."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.backbones import create_backbone, describe
from pipeline.models.family import FAMILY
from pipeline.models.folding import folded

SMALL = sorted(name for name in FAMILY if not any(deep in name for deep in ("101", "152", "110", "1202")))


def moved(name: str, head_stages: int = 1) -> nn.Module:
    """A network whose statistics, scales and shifts are not those that they begin with."""
    torch.manual_seed(0)
    network = create_backbone(name, 5, head_stages=head_stages)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.2)
    return network.to(memory_format=torch.channels_last).eval()


def pictures() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Numbers here reach from hundredths to thousands, because nothing has been trained."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SMALL)
def test_the_whole_family_answers_as_before(name: str) -> None:
    network = moved(name)
    with torch.inference_mode():
        assert_same(folded(network)(pictures()), network(pictures()))


def test_stages_are_described_as_before() -> None:
    network = moved("resnet18", head_stages=3)
    with torch.inference_mode():
        (logits, stages), (expected, expected_stages) = (describe(n, pictures()) for n in (folded(network), network))
    assert_same(logits, expected)
    for stage, of_before in zip(stages, expected_stages, strict=True):
        assert_same(stage, of_before)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "seresnext50_32x4d"])
def test_no_normalisation_is_left(name: str) -> None:
    network = folded(moved(name))
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_the_network_itself_stays_as_it_was() -> None:
    network = moved("resnet18").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    copy = folded(network)
    assert network.training
    assert not copy.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_networks_of_timm_are_left_alone() -> None:
    network = create_backbone("timm/resnet18", 5)
    assert folded(network) is network
