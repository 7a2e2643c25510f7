"""Weights from files: what fits, what is refused, and what each network expects."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import UserError, near_matches
from pipeline.models.backbones import IMAGENET_PREPROCESSING, create_backbone, default_preprocessing, head_name
from pipeline.models.weights import load_pretrained, preprocessing_record
from tests.states import (
    CACHED_TAG,
    SMALL,
    assert_refused,
    assert_same,
    randomised,
    snapshot,
)

pytestmark = pytest.mark.usefixtures("no_network")


# Loading a file


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_all_but_the_head_comes_from_the_file(tmp_path, suffix):
    state = randomised(create_backbone("resnet18", 1000))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    network = create_backbone("resnet18", 3)
    head = snapshot(network.fc)

    report = load_pretrained(network, str(path))

    loaded = network.state_dict()
    for key, value in loaded.items():
        if not key.startswith("fc."):
            assert torch.equal(value, state[key]), key
    assert_same(snapshot(network.fc), head)
    assert (report.source, report.new_head) == (str(path), "fc")
    assert report.loaded == len(state) - 2 == 120
    assert "120 tensors" in str(report)
    assert "'fc' starts fresh" in str(report)


def test_the_head_stays_fresh_even_where_its_shape_fits(tmp_path):
    network = create_backbone(SMALL, 5)
    state = randomised(network)
    save_file(state, tmp_path / "same_classes.safetensors")
    head = snapshot(network.fc)
    load_pretrained(network, str(tmp_path / "same_classes.safetensors"))
    assert_same(snapshot(network.fc), head)
    assert torch.equal(network.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(tmp_path, kind):
    network = create_backbone(SMALL, 3)
    half = {key: value.to(kind) if value.is_floating_point() else value for key, value in randomised(network).items()}
    save_file(half, tmp_path / "half.safetensors")
    load_pretrained(network, str(tmp_path / "half.safetensors"))
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            assert value.dtype == torch.float32
            if not key.startswith("fc."):
                assert torch.equal(value, half[key].float())


def test_a_file_without_batch_counters_and_without_a_head_loads(tmp_path):
    network = create_backbone(SMALL, 3)
    state = {
        key: value
        for key, value in randomised(network).items()
        if not key.endswith("num_batches_tracked") and not key.startswith("fc.")
    }
    torch.save(state, tmp_path / "old.pth")
    assert load_pretrained(network, str(tmp_path / "old.pth")).loaded == len(state)
    loaded = network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    network = create_backbone(SMALL, 3)
    save_file(randomised(network), tmp_path / "weights.safetensors")
    assert load_pretrained(network, "~/weights.safetensors").loaded > 0


# Files that do not fit


def test_another_architecture_is_named_by_its_keys(tmp_path):
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in create_backbone("resnet50", 10).state_dict().items()}
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, tmp_path / "r50.pth")
    message = assert_refused(create_backbone("resnet18", 3), str(tmp_path / "r50.pth"), "r50.pth")
    assert "unexpected: layer1.0.conv3.weight" in message
    assert "layer1.0.conv1.weight (64, 64, 1, 1) instead of (64, 64, 3, 3)" in message
    assert "Set model.backbone" in message


def test_a_missing_an_unexpected_and_a_misshapen_key_are_each_an_error(tmp_path):
    network = create_backbone(SMALL, 3)
    norm = next(key for key in network.state_dict() if key.endswith("bn1.running_mean"))
    convolution = next(key for key in network.state_dict() if key.endswith("conv2.weight"))
    path = str(tmp_path / "weights.pth")

    state = randomised(network)
    del state[norm]
    torch.save(state, path)
    assert_refused(network, path, f"1 missing: {norm}.")

    torch.save({**randomised(network), "ema.decay": torch.zeros(1)}, path)
    assert_refused(network, path, "1 unexpected: ema.decay.")

    state = randomised(network)
    state[convolution] = state[convolution][:-1]
    torch.save(state, path)
    assert_refused(network, path, "1 of another shape: ", f"{convolution} (", "instead of")


def test_a_key_that_only_starts_like_the_head_is_not_skipped(tmp_path):
    network = create_backbone(SMALL, 3)
    torch.save({**randomised(network), "fc_extra.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    assert_refused(network, str(tmp_path / "weights.pth"), "fc_extra.weight")


# Unsafe, damaged and absent files


class Malicious:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path, zipped):
    network, mark = create_backbone(SMALL, 3), tmp_path / "mark"
    path = tmp_path / "weights.pth"
    torch.save({**randomised(network), "extra": Malicious(mark)}, path, _use_new_zipfile_serialization=zipped)
    assert_refused(network, str(path), str(path), "safetensors")
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file was harmless, and this test showed nothing"


def test_a_pickled_network_is_refused_with_the_way_on(tmp_path):
    network = create_backbone(SMALL, 3)
    torch.save(network, tmp_path / "whole.pth")
    assert_refused(network, str(tmp_path / "whole.pth"), "other objects than tensors", "state dict alone")


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {"conv1.weight": torch.zeros(1)}}, [torch.zeros(1)], {0: torch.zeros(1)}],
    ids=["nested", "list", "numbered"],
)
def test_tensors_that_are_no_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert_refused(create_backbone(SMALL, 3), str(tmp_path / "weights.pth"), "weights.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_damaged_file_is_named(tmp_path, suffix, keep):
    network = create_backbone(SMALL, 3)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(randomised(network), path)
    else:
        save_file(randomised(network), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert_refused(network, str(path), f"at '{path}'", "cannot be read")


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    (tmp_path / "weights.onnx").write_bytes(b"onnx")
    network = create_backbone(SMALL, 3)
    message = assert_refused(network, str(tmp_path / "weights.onnx"), "weights.onnx")
    assert ".safetensors or .pth" in message
    assert "timm/<tag>" in message
    assert_refused(network, "resnet18", "'resnet18'", "timm/<tag>")


def test_a_missing_file_is_named_with_its_near_match(tmp_path):
    (tmp_path / "cells_resnet18.pth").write_bytes(b"")
    network = create_backbone(SMALL, 3)
    assert_refused(
        network, str(tmp_path / "cell_resnet18.pth"), "cell_resnet18.pth'", "did you mean cells_resnet18.pth?"
    )
    assert_refused(network, str(tmp_path / "nowhere" / "weights.pth"), "found nothing")


# Names


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("resnet81", ("model.backbone", "'resnet81'", "did you mean resnet18", "resnet152")),
        ("convnext_tiny", ("model.backbone", "'convnext_tiny'", "timm/<model>")),
        ("timm/convnext_tinny", ("model.backbone", "'timm/convnext_tinny'", "did you mean convnext_tiny")),
        ("timm/", ("model.backbone", "'timm/'")),
    ],
)
def test_an_unknown_backbone_is_an_error_with_near_matches(name, texts):
    for make in (lambda: create_backbone(name, 2), lambda: default_preprocessing(name)):
        with pytest.raises(UserError) as caught:
            make()
        for text in texts:
            assert text in str(caught.value)


@pytest.mark.parametrize(
    ("tag", "texts"),
    [
        ("timm/resnet18.a1_in1", ("'timm/resnet18.a1_in1'", "its tags are", "resnet18.a1_in1k", "resnet18.tv_in1k")),
        ("timm/resnet81.a1_in1k", ("'timm/resnet81.a1_in1k'", "did you mean resnet18.a1_in1k")),
    ],
)
def test_an_unknown_tag_is_an_error_with_near_matches(tag, texts):
    message = assert_refused(create_backbone(SMALL, 2), tag, "model.weights", *texts)
    with pytest.raises(UserError) as caught:
        preprocessing_record("resnet18", tag)
    assert str(caught.value) == message


def test_near_matches_are_silent_where_nothing_is_near():
    assert near_matches("xyz", ["resnet18", "resnet34"]) == ""
    assert near_matches("resnet81", ["resnet18", "vgg"]) == "did you mean resnet18? "


def test_a_network_with_two_classifiers_is_refused():
    with pytest.raises(UserError, match=r"found 2 \(head, head_dist\)"):
        create_backbone("timm/deit_tiny_distilled_patch16_224", 2)


def test_the_head_is_found_by_name():
    assert head_name(create_backbone("resnet18", 2)) == "fc"
    for name in ("timm/test_resnet", "timm/tf_efficientnet_lite0", "timm/test_vit", "timm/test_convnext"):
        network = create_backbone(name, 2)
        assert network.get_submodule(head_name(network)) is network.get_classifier()
        assert network.get_classifier().out_features == 2


def test_a_network_without_a_classifier_is_refused():
    network = nn.Linear(2, 2)
    network.pretrained_cfg = {}
    with pytest.raises(UserError, match="one classifier, found none"):
        head_name(network)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "timm/tf_efficientnet_lite0", "timm/test_vit"])
def test_a_fresh_head_starts_small(name):
    torch.manual_seed(0)
    network = create_backbone(name, 40)
    head = network.get_submodule(head_name(network))
    assert isinstance(head, nn.Linear)
    assert head.weight.shape[0] == 40
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (head.bias == 0).all()


# Preprocessing that belongs to weights


def test_own_networks_bring_the_record_of_the_paper():
    assert preprocessing_record("resnet50", None) == IMAGENET_PREPROCESSING
    assert preprocessing_record("resnet50", "some/file.safetensors") == IMAGENET_PREPROCESSING
    record = preprocessing_record("resnet18", None)
    assert (record["size"], record["crop"], record["interpolation"]) == (224, 0.875, "bilinear")
    record["size"] = 1
    assert preprocessing_record("resnet18", None)["size"] == 224, "a caller changed the record of the others"


def test_a_tag_brings_its_own_record():
    assert preprocessing_record("resnet18", CACHED_TAG) == {
        "size": 224,
        "crop": 0.95,
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "channels": 3,
    }
    assert preprocessing_record("resnet18", "timm/resnet18.tv_in1k")["crop"] == 0.875
    assert preprocessing_record("timm/resnet18", "timm/resnet18.tv_in1k")["interpolation"] == "bilinear"


def test_a_timm_model_brings_its_own_record():
    expected = {
        "size": 224,
        "crop": 0.875,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "channels": 3,
    }
    assert preprocessing_record("timm/tf_efficientnet_lite0", None) == expected
    assert preprocessing_record("timm/tf_efficientnet_lite0", "package:some/file.pth") == expected
