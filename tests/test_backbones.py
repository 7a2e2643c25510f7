"""One protocol for our own networks and timm's: parts, features, maps, depth, and what they expect of images."""

import pickle
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.backbones import (
    CIFAR_PREPROCESSING,
    IMAGENET_PREPROCESSING,
    create_backbone,
    default_preprocessing,
    depth_groups,
    describe,
    described_by_head,
    feature_widths,
    features,
    first_convolution,
    has_linear_head,
    head_name,
    most_head_stages,
    spatial_map,
    timm_preprocessing,
)
from pipeline.models.family import FAMILY

OWN = ["resnet18", "resnet50d", "resnet20"]
# Small networks of as many kinds: tokens, channels last, a head of several layers, no batch norm ...
OF_TIMM = [
    "timm/test_vit",
    "timm/test_convnext",
    "timm/test_efficientnet",
    "timm/test_resnet",
    "timm/test_byobnet",
    "timm/test_nfnet",
    "timm/test_mambaout",
    "timm/mobilenetv3_small_050",
]
PANEL = OWN + OF_TIMM
# Those of them that have stages: maps of several sizes.
OF_STAGES = [name for name in OF_TIMM if name != "timm/test_vit"]
SWIN = "timm/swin_tiny_patch4_window7_224"


def images_for(name: str, count: int = 2, channels: int = 3) -> Tensor:
    """Noise of the size that the network is made for, or smaller where it takes any."""
    size = {"timm/test_vit": 160, "timm/test_vit2": 160, "timm/test_vit_relpos": 160, SWIN: 224}.get(name, 64)
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def made(name: str, **options: float) -> nn.Module:
    """A network in evaluation, with a head that tells images apart from the start."""
    torch.manual_seed(0)
    network = create_backbone(name, 5, **options).eval().requires_grad_(False)
    nn.init.normal_(network.get_submodule(head_name(network)).weight, std=0.2)
    return network


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return create_backbone(name, 5)


# Creation


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", PANEL)
def test_a_network_sees_every_channel_of_its_images(name, channels):
    network = made(name, in_channels=channels)
    assert network.get_submodule(first_convolution(network)).weight.shape[1] == channels
    images = images_for(name, channels=channels)
    logits = network(images)
    assert logits.shape == (2, 5)
    for channel in range(channels):
        changed = images.clone()
        changed[:, channel] += 1 + changed[:, channel].roll(5, -1)
        assert (network(changed) - logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", PANEL)
def test_dropout_zeroes_its_share_of_the_features_in_training_alone(name):
    network = made(name, dropout=0.3)
    maps = network.forward_features(images_for(name))
    maps = maps.repeat(100, *(1,) * (maps.ndim - 1))
    kept = network.forward_head(maps, pre_logits=True)
    dropped = network.train().forward_head(maps, pre_logits=True)
    alive = kept != 0
    assert alive.float().mean() > 0.1
    zero = dropped[alive] == 0
    assert 0.27 < zero.float().mean() < 0.33
    torch.testing.assert_close(dropped[alive][~zero], kept[alive][~zero] / 0.7)


@pytest.mark.parametrize("name", PANEL)
def test_without_dropout_the_head_is_the_same_in_training(name):
    network = made(name)
    maps = network.forward_features(images_for(name))
    expected = network.forward_head(maps)
    assert torch.equal(network.train().forward_head(maps), expected)


# Parts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "conv1"),
        ("resnet50d", "conv1.0"),
        ("resnet20", "conv1"),
        ("resnet50_keras", "conv1"),
        ("timm/test_vit", "patch_embed.proj"),
        ("timm/test_convnext", "stem.0"),
        ("timm/test_resnet", "conv1.0"),
        ("timm/mobilenetv3_small_050", "conv_stem"),
        ("timm/fastvit_t8", None),  # has two, side by side
    ],
)
def test_the_first_convolution_is_found_by_name(name, expected):
    network = on_meta(name)
    assert first_convolution(network) == expected
    if expected is not None:
        convolutions = [key for key, module in network.named_modules() if isinstance(module, nn.Conv2d)]
        assert convolutions[0] == expected
        assert network.get_submodule(expected).in_channels == 3


def test_a_record_without_a_first_convolution_has_none():
    assert first_convolution(SimpleNamespace(pretrained_cfg={})) is None


# Features and maps


@pytest.mark.parametrize("name", [*PANEL, "timm/test_vit2"])
def test_the_head_makes_the_logits_of_the_features(name):
    network = made(name)
    images = images_for(name)
    found = features(network, images)
    assert found.ndim == 2
    assert (found[0] - found[1]).abs().max() > 1e-3
    head = network.get_submodule(head_name(network))
    assert isinstance(head, nn.Linear)
    logits = network(images)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    torch.testing.assert_close(head(found), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("name", [*OWN, "resnet50_keras", *OF_STAGES])
def test_a_head_of_several_stages_makes_the_logits_of_their_features(name, stages):
    narrow = made(name)
    network = made(name, head_stages=stages)
    head = f"{head_name(network)}."
    body = {key: value for key, value in narrow.state_dict().items() if not key.startswith(head)}
    report = network.load_state_dict(body, strict=False)
    assert (report.unexpected_keys, report.missing_keys) == ([], [f"{head}weight", f"{head}bias"])
    images = images_for(name)
    logits, described = describe(network, images)
    found = features(network, images)
    # Of earlier stages what their maps are in the mean; of the last, what a head that sees no other classifies.
    assert torch.equal(found, torch.cat([*described[-stages:-1], features(narrow, images)], dim=1))
    assert found.shape == (2, sum(feature_widths(network)))
    assert [stage.shape[1] for stage in described[-stages:-1]] == feature_widths(network)[:-1]
    assert torch.equal(logits, network(images))
    torch.testing.assert_close(network.get_submodule(head_name(network))(found), logits, rtol=1e-5, atol=1e-6)
    whole = described_by_head(name, stages)
    assert not whole or torch.equal(found, torch.cat(described, dim=1))


# (Alone, the last of them drops behind what timm calls its features.)
@pytest.mark.parametrize("name", [*OWN, *OF_STAGES, "timm/lcnetv2_small"])
def test_dropout_falls_upon_all_stages_of_a_head(name):
    network = made(name, head_stages=3, dropout=0.3)
    images = images_for(name, count=1).repeat(200, 1, 1, 1)
    last, maps = network.forward_intermediates(images, indices=3)
    seen = [*maps[:-1], last]
    kept = network.forward_head(seen, pre_logits=True)
    dropped = network.train().forward_head(seen, pre_logits=True)
    of_stages = [features.split(feature_widths(network), dim=1) for features in (kept, dropped)]
    for before, after in zip(*of_stages, strict=True):
        zero = (after == 0)[before != 0]
        assert 0.25 < zero.float().mean() < 0.35
        torch.testing.assert_close(after[after != 0], before[after != 0] / 0.7)


@pytest.mark.parametrize("name", OF_STAGES)
def test_a_network_with_a_wider_head_is_the_same_in_all_else(name):
    narrow, network = on_meta(name), create_backbone(name, 5, head_stages=3)
    assert isinstance(network, type(narrow))
    assert depth_groups(network) == depth_groups(narrow)
    assert first_convolution(network) == first_convolution(narrow)
    assert most_head_stages(network) == 3
    images = images_for(name)
    for twin in (deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin.eval()(images), network.eval()(images))
        with torch.no_grad():
            twin.get_submodule(head_name(twin)).bias += 1
        assert torch.allclose(twin(images), network(images) + 1)


@pytest.mark.parametrize(
    ("name", "stages", "expected"),
    [
        ("resnet18", 4, "1 to 3"),
        ("timm/test_efficientnet", 4, "1 to 3"),
        ("timm/test_efficientnet", 0, "1 to 3"),
        ("timm/test_vit", 2, "expected 1 for"),  # blocks, not stages
        ("timm/dla46_c", 2, "expected 1 for"),  # classifies by a convolution
        ("timm/convformer_s18", 2, "expected 1 for"),  # by two layers
        ("timm/efficientvit_m0", 2, "expected 1 for"),  # normalises what timm calls its features before
    ],
)
def test_a_head_sees_no_more_stages_than_it_can(name, stages, expected):
    with pytest.raises(UserError, match=expected):
        create_backbone(name, 4, head_stages=stages)


@pytest.mark.parametrize(("name", "most"), [*((name, 3) for name in [*OWN, *OF_STAGES]), ("timm/test_vit", 1)])
def test_a_head_can_see_stages_where_there_are_such(name, most):
    assert most_head_stages(create_backbone(name, 5)) == most


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        *((name, True) for name in PANEL),
        ("timm/dla46_c", False),
        ("timm/efficientvit_m0", False),
        ("timm/shvit_s1", False),
    ],
)
def test_a_head_is_linear_that_reads_the_features_as_they_are(name, linear):
    network = create_backbone(name, 5, in_channels=4)
    assert has_linear_head(network, 4) == linear
    assert all(module.training for module in network.modules())


def test_a_head_of_several_stages_of_a_transformer_that_has_such():
    network = made(SWIN, head_stages=3)
    images = images_for(SWIN, count=1)
    assert feature_widths(network) == [192, 384, 768]
    assert torch.equal(network(images), describe(network, images)[0])


@pytest.mark.parametrize("name", [*OWN, "resnet50_keras", "timm/test_resnet", "timm/test_byobnet"])
def test_features_of_a_convolutional_network_are_the_mean_of_its_map(name):
    network = made(name)
    images = images_for(name)
    maps = network.forward_features(images)
    found = spatial_map(network, maps)
    assert found.shape == (2, network.num_features, *((16, 16) if name == "resnet20" else (2, 2)))
    assert torch.equal(found, maps)
    torch.testing.assert_close(found.mean((2, 3)), features(network, images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm/test_vit", (64, 10, 10)),  # one token before those of the patches
        ("timm/test_vit2", (64, 10, 10)),  # a register instead
        ("timm/test_vit_relpos", (96, 10, 10)),  # patches alone
        (SWIN, (768, 7, 7)),  # channels last
        ("timm/test_mambaout", (64, 2, 2)),  # channels last
        ("timm/test_convnext", (64, 2, 2)),
    ],
)
def test_a_map_has_its_positions_where_timm_has_them(name, shape):
    network = made(name)
    images = images_for(name, count=1)
    maps = network.forward_features(images)
    found = spatial_map(network, maps)
    assert found.shape == (1, *shape)
    assert (found != found.transpose(2, 3)).any(), "a map that is its own mirror image would hide rows and columns"
    (expected,) = network.forward_intermediates(images, indices=1, intermediates_only=True, norm=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.untyped_storage().data_ptr() == maps.untyped_storage().data_ptr(), "a copy instead of a view"


def test_tokens_become_rows_of_positions_without_those_that_come_before():
    tokens = torch.arange(14.0).reshape(1, 14, 1).repeat(2, 1, 3)
    found = spatial_map(SimpleNamespace(num_prefix_tokens=5), tokens)
    assert found.shape == (2, 3, 3, 3)
    assert found[1, 2].tolist() == [[5, 6, 7], [8, 9, 10], [11, 12, 13]]


# Depth


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", [*PANEL, "resnet110", "seresnet34", "resnet101_keras", "plain18", SWIN])
def test_groups_hold_every_parameter_once_from_stem_to_head(name, coarse):
    network = on_meta(name)
    groups = depth_groups(network, coarse=coarse)
    names = [key for key, _ in network.named_parameters()]
    assert all(groups)
    assert sorted(key for group in groups for key in group) == sorted(names)
    assert groups[-1] == [f"{head_name(network)}.weight", f"{head_name(network)}.bias"]
    assert f"{first_convolution(network)}.weight" in groups[0]
    starts = [names.index(group[0]) for group in groups]
    assert starts == sorted(starts)
    assert 4 < len(groups) < 60
    assert len(groups) >= len(depth_groups(network, coarse=True))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet18", (2, 2, 2, 2)), ("resnet50d", (3, 4, 6, 3)), ("resnet20", (3, 3, 3)), ("resnet110", (18, 18, 18))],
)
def test_own_networks_are_grouped_by_block_or_by_stage(name, blocks):
    network = on_meta(name)
    head = head_name(network)

    def places(coarse: bool, parts: int) -> list[set[str]]:
        return [{".".join(key.split(".")[:parts]) for key in group} for group in depth_groups(network, coarse=coarse)]

    numbered = [(f"layer{stage}", depth) for stage, depth in enumerate(blocks, start=1)]
    stem, head_group = {"conv1", "bn1"}, {head}
    assert places(True, 1) == [stem, *({stage} for stage, _ in numbered), head_group]
    assert places(False, 2)[1:-1] == [{f"{stage}.{i}"} for stage, depth in numbered for i in range(depth)]
    assert (places(False, 1)[0], places(False, 1)[-1]) == (stem, head_group)


def test_blocks_of_a_transformer_are_groups_of_their_own():
    groups = depth_groups(on_meta("timm/test_vit"))
    assert len(groups) == 8
    assert set(groups[0]) == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for number, group in enumerate(groups[1:-2]):
        assert all(key.startswith(f"blocks.{number}.") for key in group)
    assert "norm.weight" in groups[-2]


def test_a_network_that_does_not_tell_its_depth_is_one_group_and_its_head():
    network = on_meta("timm/poolformer_s12")
    assert not hasattr(network, "group_matcher")
    body, head = depth_groups(network)
    assert head == ["head.fc.weight", "head.fc.bias"]
    assert body == [key for key, _ in network.named_parameters() if key not in head]


# Preprocessing


@pytest.mark.parametrize("name", FAMILY)
def test_own_networks_expect_the_images_of_their_paper(name):
    record = default_preprocessing(name)
    small = name.startswith("plain") and name not in ("plain18", "plain34")
    small |= name.removesuffix("_b") in {f"resnet{n}" for n in (20, 32, 44, 56, 110, 1202)}
    assert (record["size"], record["crop"]) == ((32, 1.0) if small else (224, 0.875))
    assert record["interpolation"] == "bilinear"
    assert record["mean"] == [0.485, 0.456, 0.406]
    assert record["std"] == [0.229, 0.224, 0.225]
    assert record["channels"] == 3


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_a_caller_may_change_its_record(name):
    expected = (IMAGENET_PREPROCESSING if name == "resnet18" else CIFAR_PREPROCESSING)["mean"][:]
    default_preprocessing(name)["mean"].append(0.5)
    assert default_preprocessing(name)["mean"] == expected


def test_a_timm_model_without_a_record_expects_what_our_own_do(monkeypatch):
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda name: None)
    assert default_preprocessing("timm/test_vit") == IMAGENET_PREPROCESSING


@pytest.mark.parametrize(
    ("record", "differs"),
    [
        ({}, {}),
        ({"input_size": None, "crop_pct": None, "interpolation": "", "mean": None, "std": ()}, {}),
        ({"crop_pct": 1.15}, {"crop": 1.0}),
        ({"crop_pct": 1}, {"crop": 1.0}),
        ({"crop_pct": 0.9, "interpolation": "bicubic"}, {"crop": 0.9, "interpolation": "bicubic"}),
        ({"input_size": (3, 160, 160)}, {"size": 160}),
        (
            {"input_size": [1, 28, 28], "mean": (0.13,), "std": (0.31,)},
            {"size": 28, "channels": 1, "mean": [0.13], "std": [0.31]},
        ),
        ({"test_input_size": (3, 288, 288), "test_crop_pct": 0.5, "url": "", "num_classes": 0}, {}),
    ],
)
def test_what_a_record_leaves_out_is_as_for_imagenet(record, differs):
    found = timm_preprocessing(record)
    assert found == {**IMAGENET_PREPROCESSING, **differs}
    assert type(found["mean"]) is type(found["std"]) is list


@pytest.mark.parametrize("name", ["coat_tiny", "pit_ti_224"])
def test_a_network_without_a_map_of_positions_says_so(name):
    network = create_backbone(f"timm/{name}", 2).eval()
    with torch.no_grad():
        maps = network.forward_features(torch.zeros(1, 3, 224, 224))
    with pytest.raises(UserError, match="expected a network whose last features have a place in the image"):
        spatial_map(network, maps)


def test_a_record_for_other_channels_has_a_mean_for_each():
    record = timm_preprocessing({"input_size": (5, 64, 64)})
    assert (record["channels"], record["mean"], record["std"]) == (5, [0.5] * 5, [0.5] * 5)
    assert timm_preprocessing({"input_size": (1, 64, 64), "mean": (0.2,), "std": (0.3,)})["mean"] == [0.2]
