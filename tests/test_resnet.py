"""The residual networks against timm, torchvision and a network of plain functions, number by number; their parts."""

import re
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from pipeline.models.family import FAMILY
from pipeline.models.resnet import (
    BasicBlock,
    Block,
    Bottleneck,
    ResNet,
    SqueezeExcitation,
    ZeroPadding,
    cifar_stem,
    deep_stem,
    no_shortcut,
    option_a,
    option_b,
    option_c,
    option_d,
)
from tests.networks import (
    assert_agree,
    copied,
    lively,
    logits_and_gradient,
    on_meta,
    reference,
    signature,
    some_images,
)

DEPTHS = ("18", "34", "50", "101", "152")
IN_TORCHVISION = [
    *(f"resnet{n}" for n in DEPTHS),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
]
IN_TIMM = [
    *IN_TORCHVISION,
    *(f"resnet{n}d" for n in DEPTHS),
    *(f"seresnet{n}" for n in DEPTHS),
    "seresnext50_32x4d",
]
# More, or wider, of the blocks that the others have: seconds each.
LARGE = [name for name in IN_TIMM if "101" in name or "152" in name or name.startswith("wide")]
# Every map of the first is of even size on its way through the network, every one of the second of odd size.
SIZES = (64, 65)


def from_library(library: str, name: str, num_classes: int = 1000) -> nn.Module:
    """The library's network, without memory."""
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name, pretrained=False, num_classes=num_classes)
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def with_numbers_of(ours: nn.Module, theirs: nn.Module) -> nn.Module:
    theirs.load_state_dict(copied(ours.state_dict()), strict=True, assign=True)
    return theirs.requires_grad_(False)


def assert_same_states(found: nn.Module, expected: dict[str, Tensor]) -> None:
    """After a pass in train mode: the running statistics have moved, and alike."""
    assert expected["bn1.num_batches_tracked"] > 0
    state = found.state_dict()
    assert list(state) == list(expected)
    for key, value in state.items():
        torch.testing.assert_close(
            value, expected[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_the_lists_of_networks_to_compare_are_all_that_the_libraries_share_with_us():
    assert sorted(IN_TIMM) == sorted(name for name in FAMILY if timm.is_model(name))
    assert sorted(IN_TORCHVISION) == sorted(set(FAMILY) & set(torchvision.models.list_models()))
    assert (len(IN_TIMM), len(IN_TORCHVISION)) == (21, 10)


@pytest.mark.parametrize(
    ("library", "name"), [*(("timm", name) for name in IN_TIMM), *(("torchvision", name) for name in IN_TORCHVISION)]
)
def test_state_dict_has_the_names_order_shapes_and_types_of_the_library(library, name):
    found = signature(on_meta(name))
    assert len(found) > 100
    assert found == signature(from_library(library, name))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in IN_TIMM])
def test_logits_and_gradients_equal_those_of_the_libraries(name):
    ours = lively(name)
    # torchvision's 101 and 152 layers are more of the blocks that its 50 have: timm's suffice for them.
    torchvision_too = name in IN_TORCHVISION and "101" not in name and "152" not in name
    libraries = ["timm", "torchvision"] if torchvision_too else ["timm"]
    theirs = [with_numbers_of(ours, from_library(library, name, num_classes=7)) for library in libraries]
    for size in SIZES:
        images = some_images(size)
        for training in (False, True):
            found = logits_and_gradient(ours.train(training), images)
            assert found[0].shape == (2, 7)
            for network in theirs:
                assert_agree(found, logits_and_gradient(network.train(training), images))
    for network in theirs:
        assert_same_states(ours, network.state_dict())


def test_the_original_strides_are_those_of_timm_moved_to_the_first_convolution():
    ours = lively("resnet50_v1")
    theirs = from_library("timm", "resnet50", num_classes=7)
    for layer in (theirs.layer2, theirs.layer3, theirs.layer4):
        assert (layer[0].conv1.stride, layer[0].conv2.stride) == ((1, 1), (2, 2))
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    with_numbers_of(ours, theirs)
    for size in SIZES:
        for training in (False, True):
            images = some_images(size)
            found = logits_and_gradient(ours.train(training), images)
            assert_agree(found, logits_and_gradient(theirs.train(training), images))
    assert_same_states(ours, theirs.state_dict())


@pytest.mark.parametrize(
    ("name", "depths", "options"),
    [
        ("resnet20", (3, 3, 3), {"cifar": True, "shortcut": "A"}),
        ("resnet20_b", (3, 3, 3), {"cifar": True, "shortcut": "B"}),
        ("plain20", (3, 3, 3), {"cifar": True, "shortcut": None}),
        ("resnet34_a", (3, 4, 6, 3), {"shortcut": "A"}),
        ("resnet34_c", (3, 4, 6, 3), {"shortcut": "C"}),
        ("plain18", (2, 2, 2, 2), {"shortcut": None}),
        ("resnet50_keras", (3, 4, 6, 3), {"keras": True}),
    ],
)
def test_networks_of_no_library_equal_a_network_of_plain_functions(name, depths, options):
    ours = lively(name)
    state = copied(ours.state_dict())
    for size in (32, 33) if "cifar" in options else SIZES:
        images = some_images(size)
        for training in (False, True):
            found = logits_and_gradient(ours.train(training), images)
            assert_agree(found, logits_and_gradient(reference(state, depths, training=training, **options), images))
    assert_same_states(ours, state)


def test_the_network_of_plain_functions_equals_torchvision_where_it_can():
    """Holds the reference itself against something that neither it nor our networks were written from."""
    theirs = with_numbers_of(lively("resnet18"), from_library("torchvision", "resnet18", num_classes=7))
    state = copied(theirs.state_dict())
    for training in (False, True):
        found = logits_and_gradient(reference(state, (2, 2, 2, 2), training=training), some_images(65))
        assert_agree(found, logits_and_gradient(theirs.train(training), some_images(65)))
    assert_same_states(theirs, state)


# Shortcuts and blocks


def test_option_a_picks_even_positions_and_adds_half_the_channels_on_each_side():
    x = torch.arange(1.0, 1 + 2 * 4 * 5 * 6).reshape(2, 4, 5, 6)
    found = ZeroPadding(4, 10, 2)(x)
    assert found.shape == (2, 10, 3, 3)
    rows, columns = torch.tensor([0, 2, 4]), torch.tensor([0, 2, 4])
    assert torch.equal(found[:, 3:7], x.index_select(2, rows).index_select(3, columns))
    assert not found[:, :3].any()
    assert not found[:, 7:].any()
    odd = ZeroPadding(4, 7, 1)(x)
    assert torch.equal(odd[:, 1:5], x), "the odd one of three channels belongs behind"
    assert not odd[:, 0].any()
    assert not odd[:, 5:].any()
    assert not list(ZeroPadding(4, 10, 2).parameters())


@pytest.mark.parametrize("make", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(
    ("shortcut", "same", "changing"),
    [
        (option_a, nn.Identity, ZeroPadding),
        (option_b, nn.Identity, nn.Sequential),
        (option_c, nn.Sequential, nn.Sequential),
        (option_d, nn.Identity, nn.Sequential),
        (no_shortcut, type(None), type(None)),
    ],
)
def test_each_option_has_its_way_around_blocks_that_keep_the_shape_and_blocks_that_change_it(
    make, shortcut, same, changing
):
    width = 16 if make is Bottleneck else 64
    assert type(make(64, width, 1, shortcut=shortcut).downsample) is same
    assert type(make(64, width, 2, shortcut=shortcut).downsample) is changing
    assert type(make(64, 2 * width, 1, shortcut=shortcut).downsample) is changing


@pytest.mark.parametrize("gate", [nn.Identity, SqueezeExcitation])
@pytest.mark.parametrize("make", [BasicBlock, Bottleneck])
def test_a_fresh_block_is_its_shortcut(make, gate):
    torch.manual_seed(0)
    network = ResNet(partial(make, gate=gate), ((2, 16), (1, 24)), num_classes=2)
    expansion = 1 if make is BasicBlock else 4
    for block, stride, channels in ((network.layer1[1], 1, 16 * expansion), (network.layer2[0], 2, 24 * expansion)):
        x = torch.randn(2, 16 * expansion, 7, 7)
        for training in (False, True):
            block.train(training)
            shortcut = x
            if stride == 2:
                shortcut = F.conv2d(x, block.downsample[0].weight, stride=2)
                shortcut = F.batch_norm(shortcut, torch.zeros(channels), torch.ones(channels), training=training)
            assert (shortcut < 0).any(), "without negative values relu would not be seen"
            torch.testing.assert_close(block(x.clone()), shortcut.relu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet18", 8), ("resnet50", 16), ("resnet50_keras", 16), ("seresnet18", 8), ("resnet18d", 8), ("resnet20", 9)],
)
def test_only_the_last_norm_of_each_block_starts_at_zero(name, blocks):
    norms = {key: m for key, m in FAMILY[name](num_classes=2).named_modules() if isinstance(m, nn.BatchNorm2d)}
    last = r"layer\d\.\d\.bn3" if "50" in name else r"layer\d\.\d\.bn2"
    assert sum(re.fullmatch(last, key) is not None for key in norms) == blocks
    for key, norm in norms.items():
        assert (norm.weight == (0 if re.fullmatch(last, key) else 1)).all(), key
        assert not norm.bias.any(), key


@pytest.mark.parametrize("name", ["plain18", "plain20"])
def test_in_a_plain_network_no_norm_starts_at_zero(name):
    """It would make every output of the network zero, for there is no way around the block."""
    network = FAMILY[name](num_classes=2)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == int(name[5:]) - 1
    assert all((norm.weight == 1).all() for norm in norms)
    assert all(module.downsample is None for module in network.modules() if isinstance(module, Block))


def test_fresh_convolutions_are_drawn_by_fan_out_and_their_biases_are_zero():
    torch.manual_seed(0)
    network = FAMILY["resnet50_keras"](num_classes=2)
    convolutions = {k: m for k, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convolutions) == 53
    for key, convolution in convolutions.items():
        fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
        assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), key
        assert not convolution.bias.any(), key


def test_a_used_network_can_be_made_fresh():
    used, fresh = lively("resnet18"), FAMILY["resnet18"](num_classes=7)
    for network in (used, fresh):
        torch.manual_seed(0)
        network.reset_parameters()
    for key, value in used.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key]), key


def test_squeeze_excitation_has_the_widths_of_timm():
    for channels in (8, 24, 64, 136, 200, 256, 328, 2048):
        theirs = timm.layers.SEModule(channels, rd_ratio=1 / 16, rd_divisor=8)
        assert SqueezeExcitation(channels).fc1.weight.shape == theirs.fc1.weight.shape


# Networks of any size


@pytest.mark.parametrize("name", ["resnet18", "resnet18d", "resnet20", "seresnet50"])
@pytest.mark.parametrize(("channels", "size"), [(1, (32, 32)), (4, (65, 65)), (5, (70, 70)), (1, (33, 48))])
def test_any_number_of_channels_and_any_size_from_32_pixels_on_trains(name, channels, size):
    torch.manual_seed(0)
    network = FAMILY[name](num_classes=3, in_channels=channels)
    logits = network(torch.randn(2, channels, *size))
    assert logits.shape == (2, 3)
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    first = network.get_submodule(network.first_convolution).weight
    assert first.shape[1] == channels
    assert torch.isfinite(first.grad).all()
    assert (first.grad.abs().amax((0, 2, 3)) > 0).all(), "a channel of the image teaches nothing"


@pytest.mark.parametrize(("name", "features"), [("resnet18", 512), ("resnet50", 2048), ("resnet34d", 512)])
def test_features_are_a_thirty_second_of_the_size_and_give_the_logits(name, features):
    network = lively(name, num_classes=3).eval()
    assert network.num_features == features
    for size, side in ((32, 1), (64, 2), (70, 3)):
        images = some_images(size)
        maps = network.forward_features(images)
        assert maps.shape == (2, features, side, side)
        assert (maps >= 0).all()
        assert torch.equal(network.forward_head(maps, pre_logits=True), maps.mean((2, 3)))
        torch.testing.assert_close(network(images), F.linear(maps.mean((2, 3)), network.fc.weight, network.fc.bias))


@pytest.mark.parametrize(
    ("name", "stages", "widths"), [("resnet18", 3, (128, 256, 512)), ("resnet50", 2, (1024, 2048))]
)
def test_a_head_of_several_stages_classifies_their_means_side_by_side(name, stages, widths):
    torch.manual_seed(0)
    network = FAMILY[name](num_classes=3, head_stages=stages).eval()
    assert [*network.state_dict()] == [*FAMILY[name](num_classes=3).state_dict()]  # published weights load as ever
    seen = {}
    for number in range(1, 5):
        network.get_submodule(f"layer{number}").register_forward_hook(
            lambda _, __, out, number=number: seen.update({number: out.mean((2, 3))})
        )
    logits = network(some_images(70))
    expected = [seen[number] for number in range(5 - stages, 5)]
    assert tuple(mean.shape[1] for mean in expected) == widths
    torch.testing.assert_close(logits, F.linear(torch.cat(expected, dim=1), network.fc.weight, network.fc.bias))


def test_a_head_cannot_see_more_stages_than_there_are():
    for stages in (0, 3):
        with pytest.raises(ValueError, match="1 to 2 stages"):
            ResNet(BasicBlock, ((1, 8), (1, 16)), num_classes=2, head_stages=stages)


def test_a_table_of_your_own_with_the_numbers_of_the_paper_is_the_network_of_the_paper():
    with torch.device("meta"):
        network = ResNet(Bottleneck, ((3, 64), (4, 128), (6, 256), (3, 512)), num_classes=1000)
    assert signature(network) == signature(from_library("torchvision", "resnet50"))


@pytest.mark.parametrize(
    ("make", "stages", "stem", "side", "features"),
    [
        (Bottleneck, ((3, 64), (4, 128), (6, 256), (3, 512)), None, 3, 2048),
        (BasicBlock, ((1, 24), (2, 40)), None, 9, 40),
        (BasicBlock, ((2, 8), (1, 24), (1, 7), (3, 16), (1, 32)), deep_stem, 2, 32),
        (partial(Bottleneck, groups=8, group_width=8), ((1, 32), (1, 64)), cifar_stem, 33, 256),
        (partial(BasicBlock, shortcut=option_a), ((2, 16), (2, 21)), cifar_stem, 33, 21),
        (partial(BasicBlock, shortcut=no_shortcut), ((2, 12),), cifar_stem, 65, 12),
    ],
)
def test_other_depths_widths_and_numbers_of_stages_build_and_train(make, stages, stem, side, features):
    torch.manual_seed(0)
    network = ResNet(make, stages, num_classes=4, **({} if stem is None else {"stem": stem}))
    assert [len(network.get_submodule(name)) for name in network.stage_names] == [depth for depth, _ in stages]
    maps = network.forward_features(torch.randn(2, 3, 65, 65))
    assert maps.shape == (2, features, side, side)
    logits = network.forward_head(maps)
    assert logits.shape == (2, 4)
    F.cross_entropy(logits, torch.tensor([0, 3])).backward()
    gradient = network.get_submodule(network.first_convolution).weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient.any()


# Dropout


def test_dropout_zeroes_its_share_of_the_features_in_training_alone():
    torch.manual_seed(0)
    network = FAMILY["resnet18"](num_classes=3, dropout=0.25)
    maps = torch.ones(40, 512, 2, 2)
    features = network.train().forward_head(maps, pre_logits=True)
    zero = features == 0
    assert 0.23 < zero.float().mean() < 0.27
    torch.testing.assert_close(features[~zero], torch.full_like(features[~zero], 1 / 0.75))
    assert not torch.equal(network.forward_head(maps), network.forward_head(maps))
    network.eval()
    assert torch.equal(network.forward_head(maps, pre_logits=True), torch.ones(40, 512))
    assert torch.equal(network.forward_head(maps), network.forward_head(maps))


def test_without_dropout_training_is_not_random():
    network = lively("resnet18").train()
    images = some_images(32, count=4)
    assert torch.equal(network(images), network(images))


def test_option_a_cannot_drop_channels():
    with pytest.raises(ValueError, match="at least the 8 channels"):
        ZeroPadding(8, 4, 1)
