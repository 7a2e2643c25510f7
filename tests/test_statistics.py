"""Statistics of batch normalisations, against those that torch keeps itself."""

import copy

import pytest
import torch
from torch import nn

from pipeline.finetuning.statistics import measure_statistics, normalisations, normalises_depthwise
from pipeline.models.backbones import create_backbone


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return create_backbone("resnet20", 3).eval()


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.5 + 2 * torch.randn(16, 3, 32, 32, generator=generator) for _ in range(count)]


def test_they_are_what_torch_would_have_kept_in_training(network: nn.Module) -> None:
    reference = copy.deepcopy(network).train()
    for norm in normalisations(reference).values():
        norm.reset_running_stats()
        norm.momentum = None  # a mean over batches, all weighing alike
    for images in batches():
        reference(images)
    measured = measure_statistics(network, network, batches())
    assert len(measured) == 2 * len(normalisations(network)) > 20
    kept = reference.state_dict()
    for name, value in measured.items():
        # Torch keeps the variance without bias: a factor of n / (n - 1), n >= 16 * 8 * 8 here.
        torch.testing.assert_close(value, kept[name], rtol=2e-3, atol=1e-5)


def test_the_network_is_left_as_it_was(network: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    measure_statistics(network, network, batches())
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert network.training
    answers = network.eval()(batches(1)[0])
    torch.testing.assert_close(network(batches(1)[0]), answers)  # nothing goes on measuring


def test_no_batches_say_nothing(network: nn.Module) -> None:
    assert measure_statistics(network, network, []) == {}


def test_a_network_without_them_has_nothing_to_measure() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    assert measure_statistics(plain, plain, batches()) == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm/test_efficientnet", True),
        ("timm/mobilenetv3_small_050", True),
        ("resnet18", False),
        ("resnext50_32x4d", False),  # convolves in groups of several channels
        ("timm/test_convnext", False),  # has no batch normalisation
        ("timm/test_vit", False),
    ],
)
def test_depthwise_convolutions_count_where_batches_are_normalised(name: str, expected: bool) -> None:
    with torch.device("meta"):
        assert normalises_depthwise(create_backbone(name, 3)) == expected
