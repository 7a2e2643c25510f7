"""The residual networks against timm and torchvision, number by number."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from pipeline.models.family import FAMILY as RESNETS
from pipeline.models.resnet import BasicBlock, Bottleneck, ResNet

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


def lively(name: str, num_classes: int) -> ResNet:
    """A network with every norm and its statistics away from where initialisation puts them.

    Convolutions keep the variance, and residual branches stay weaker than shortcuts, so that the signal neither dies
    nor blows up in 50 blocks.
    """
    with torch.device("meta"):
        network = RESNETS[name](num_classes=num_classes)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                module.num_batches_tracked.zero_()
        for module in network.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                module.last_norm.weight.mul_(0.15)
        network.fc.weight.normal_(0, 0.05, generator=generator)
        network.fc.bias.normal_(0, 0.1, generator=generator)
    return network


def test_every_network_of_the_paper_is_offered():
    assert sorted(RESNETS) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        network = RESNETS[name](num_classes=1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_state_dict_has_the_names_order_and_shapes_of_the_library(name, library):
    with torch.device("meta"):
        ours = RESNETS[name](num_classes=1000).state_dict()
        theirs = (
            timm.create_model(name, pretrained=False)
            if library == "timm"
            else torchvision.models.get_model(name, weights=None)
        ).state_dict()
    assert [(key, value.shape, value.dtype) for key, value in ours.items()] == [
        (key, value.shape, value.dtype) for key, value in theirs.items()
    ]


@pytest.mark.parametrize("name", PARAMETERS)
def test_logits_equal_those_of_timm_in_evaluation_and_in_training(name):
    ours = lively(name, num_classes=7)
    with torch.device("meta"):
        theirs = timm.create_model(name, pretrained=False, num_classes=7)
    copies = {key: value.clone() for key, value in ours.state_dict().items()}
    theirs.load_state_dict(copies, strict=True, assign=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    images[1] = 2 * images[1] + 1
    for training in (False, True):
        ours.train(training)
        theirs.train(training)
        with torch.no_grad():
            found, expected = ours(images), theirs(images)
        assert found.shape == (2, 7)
        # Logits that hardly differ between images would agree however the network was wired.
        assert (expected[0] - expected[1]).abs().max() > 0.1
        assert (found - expected).abs().max() <= 1e-5
    # The pass in train mode has moved the running statistics, in both networks alike.
    moved = theirs.state_dict()
    assert moved["bn1.num_batches_tracked"] == 1
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, moved[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block_type", [BasicBlock, Bottleneck])
def test_a_fresh_block_is_its_shortcut(block_type, stride):
    torch.manual_seed(0)
    network = ResNet(block_type, (2, 2, 1, 1), num_classes=2)
    # The first block of the second stage projects; the second block of the first stage passes its input on.
    block = network.layer2[0] if stride == 2 else network.layer1[1]
    channels = 64 * block_type.expansion
    x = torch.randn(2, channels, 8, 8)
    for training in (False, True):
        block.train(training)
        with torch.no_grad():
            shortcut = x if block.downsample is None else block.downsample(x)
            found = block(x.clone())
        assert (shortcut < 0).any(), "without negative values relu would not be seen"
        assert torch.equal(found, shortcut.relu())
    assert (block.downsample is not None) == (stride == 2)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_only_the_last_norm_of_each_block_starts_at_zero(name):
    network = RESNETS[name](num_classes=2)
    last = {id(m.last_norm) for m in network.modules() if isinstance(m, BasicBlock | Bottleneck)}
    assert len(last) == {"resnet18": 8, "resnet50": 16}[name]
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == (0.0 if id(module) in last else 1.0)).all()


@pytest.mark.parametrize(("name", "features"), [("resnet18", 512), ("resnet50", 2048)])
def test_features_are_a_thirty_second_of_the_size_and_give_the_logits(name, features):
    network = lively(name, num_classes=3).eval()
    assert network.num_features == features
    for size, side in ((32, 1), (64, 2), (70, 3)):
        images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            found = network.forward_features(images)
            logits = network(images)
        assert found.shape == (1, features, side, side)
        torch.testing.assert_close(logits, network.fc(found.mean(dim=(2, 3))))


def test_input_of_32_pixels_trains():
    torch.manual_seed(0)
    network = RESNETS["resnet18"](num_classes=3)
    logits = network(torch.randn(2, 3, 32, 32))
    logits.sum().backward()
    assert logits.shape == (2, 3)
    assert torch.isfinite(network.conv1.weight.grad).all()
    assert network.conv1.weight.grad.abs().max() > 0


def test_other_numbers_of_input_channels():
    network = RESNETS["resnet18"](num_classes=3, in_channels=1).eval()
    assert network.conv1.weight.shape == (64, 1, 7, 7)
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 3)
