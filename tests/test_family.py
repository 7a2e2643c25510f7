"""The family by name: published sizes, costs and depths of every network."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.family import CIFAR_FAMILY, FAMILY
from pipeline.models.resnet import ZeroPadding
from tests.networks import on_meta, signature

CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)
CIFAR = [f"resnet{n}" for n in CIFAR_DEPTHS] + [f"resnet{n}_b" for n in CIFAR_DEPTHS]
CIFAR += [f"plain{n}" for n in CIFAR_DEPTHS[:4]]


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def with_statistics(network: nn.Module) -> int:
    """As Keras counts: parameters, and the means and variances of the norms."""
    running = (buffer for key, buffer in network.named_buffers() if key.endswith(("running_mean", "running_var")))
    return parameters(network) + sum(buffer.numel() for buffer in running)


# Parameters


@pytest.mark.parametrize(
    ("name", "count", "headless"),
    [
        ("resnet18", 11_689_512, 11.2),
        ("resnet34", 21_797_672, 21.3),
        ("resnet50", 25_557_032, 23.5),
        ("resnet101", 44_549_160, 42.5),
        ("resnet152", 60_192_808, 58.1),
    ],
)
def test_imagenet_networks_have_the_published_number_of_parameters(name, count, headless):
    network = on_meta(name, 1000)
    assert parameters(network) == count
    assert round((count - parameters(network.fc)) / 1e6, 1) == headless


@pytest.mark.parametrize(
    ("layers", "millions", "digits"),
    [(20, 0.27, 2), (32, 0.46, 2), (44, 0.66, 2), (56, 0.85, 2), (110, 1.7, 1), (1202, 19.4, 1)],
)
def test_cifar_networks_have_the_number_of_parameters_in_table_6_of_the_paper(layers, millions, digits):
    assert round(parameters(on_meta(f"resnet{layers}", 10)) / 1e6, digits) == millions


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet50_keras", 23.6), ("resnet101_keras", 42.7), ("resnet152_keras", 58.4)]
)
def test_networks_of_keras_have_the_published_number_of_parameters_and_statistics(name, millions):
    network = on_meta(name, 2)
    assert round((with_statistics(network) - parameters(network.fc)) / 1e6, 1) == millions


def test_the_keras_network_with_two_classes_has_the_number_that_keras_prints():
    assert with_statistics(on_meta("resnet50_keras", 2)) == 23_591_810


@pytest.mark.parametrize("name", ["resnet50_keras", "resnet101_keras", "resnet152_keras"])
def test_norms_of_keras_have_their_own_constants(name):
    norms = [module for module in on_meta(name).modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1.001e-5, 0.01)}


@pytest.mark.parametrize(
    ("plain", "residual"),
    [("plain18", None), ("plain34", "resnet34_a"), *((f"plain{n}", f"resnet{n}") for n in CIFAR_DEPTHS[:4])],
)
def test_a_plain_network_has_the_parameters_of_option_a_and_no_shortcut(plain, residual):
    network = on_meta(plain)
    assert not any("downsample" in name for name, _ in network.named_modules())
    if residual is None:
        # The three projections of torchvision's 18 layers are all that is missing.
        assert parameters(network) == 11_689_512 - sum(2 * n * n + 4 * n for n in (64, 128, 256))
    else:
        assert signature(network) == signature(on_meta(residual))


@pytest.mark.parametrize(
    ("name", "projections", "paddings"),
    [
        ("resnet34_a", 0, 3),
        ("resnet34", 3, 0),
        ("resnet34_c", 16, 0),
        ("resnet20", 0, 2),
        ("resnet20_b", 2, 0),
        ("resnet50_v1", 4, 0),
        ("resnet50_keras", 4, 0),
    ],
)
def test_options_differ_in_the_blocks_that_project(name, projections, paddings):
    network = on_meta(name)
    assert sum(key.endswith("downsample.0.weight") for key in network.state_dict()) == projections
    assert sum(isinstance(module, ZeroPadding) for module in network.modules()) == paddings


# Cost


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("resnet18", 1.814),
        ("resnet34", 3.664),
        ("resnet50_v1", 3.858),
        ("resnet101_v1", 7.570),
        ("resnet152_v1", 11.282),
        ("resnet50", 4.089),
        ("resnet101", 7.801),
        ("resnet152", 11.514),
    ],
)
def test_multiply_adds_at_224_pixels_are_the_published_ones(name, billions):
    network = on_meta(name)
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 224, 224, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    assert {str(operation) for operation in counts} == {"aten.convolution", "aten.addmm"}
    assert round(sum(counts.values()) / 2 / 1e9, 3) == billions


# Depth


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *((f"{kind}{n}", n) for kind in ("resnet", "seresnet") for n in (18, 34, 50, 101, 152)),
        *((f"resnet{n}_{kind}", n) for kind in ("v1", "keras") for n in (50, 101, 152)),
        *((f"resnet34_{option}", 34) for option in "ac"),
        *(("plain18", 18), ("plain34", 34)),
        *(("resnext50_32x4d", 50), ("resnext101_32x8d", 101), ("resnext101_64x4d", 101), ("seresnext50_32x4d", 50)),
        *(("wide_resnet50_2", 50), ("wide_resnet101_2", 101)),
        *((name, int(name.removeprefix("resnet").removeprefix("plain").removesuffix("_b"))) for name in CIFAR),
    ],
)
def test_a_network_has_as_many_layers_as_its_name_says(name, layers):
    """As the paper counts: convolutions on the way through the blocks, and the classifier."""
    outside = (".downsample.", ".se.")
    weights = [
        key
        for key, module in on_meta(name).named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not any(part in key for part in outside)
    ]
    assert len(weights) == layers


@pytest.mark.parametrize("layers", [18, 34, 50, 101, 152])
def test_the_deep_stem_adds_two_layers(layers):
    keys = [key for key in on_meta(f"resnet{layers}d").state_dict() if "conv" in key and key.endswith(".weight")]
    stem = [key for key in keys if key.startswith("conv1.")]
    assert stem == ["conv1.0.weight", "conv1.1.weight", "conv1.3.weight", "conv1.4.weight", "conv1.6.weight"]
    assert sum(key.startswith("layer") for key in keys) == layers - 2


# All of them


def test_the_networks_for_32_pixels_are_those_of_section_4_2():
    assert sorted(CIFAR_FAMILY) == sorted(CIFAR)
    assert set(FAMILY) > CIFAR_FAMILY


@pytest.mark.parametrize("name", [name for name in FAMILY if "1202" not in name])
def test_every_network_takes_classes_channels_and_dropout(name):
    with torch.device("meta"):
        network = FAMILY[name](num_classes=5, in_channels=2, dropout=0.3)
    size = 32 if name in CIFAR else 64
    maps = network.forward_features(torch.empty(2, 2, size, size, device="meta"))
    assert maps.shape == (2, network.num_features, *((8, 8) if name in CIFAR else (2, 2)))
    assert network.forward_head(maps).shape == (2, 5)
    linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    assert linear == [network.head_name] == ["linear" if name in CIFAR else "fc"]
    assert network.get_submodule(network.first_convolution).in_channels == 2
    assert [module.p for module in network.modules() if isinstance(module, nn.Dropout)] == [0.3]
    with torch.device("meta"):
        assert FAMILY[name](num_classes=5).dropout.p == 0
