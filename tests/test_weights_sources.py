"""Weights of timm, torchvision and Python packages, from their caches; and hosts that are out of reach."""

import re
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
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from pipeline.models import hub
from pipeline.models.backbones import create_backbone
from pipeline.models.hub import HubUnreachableError
from pipeline.models.sources import find_source, torchvision_weights
from pipeline.models.weights import Lineage, load_pretrained, preprocessing_record
from tests.states import (
    CACHED_TAG,
    PATIENCE_BOUND,
    SMALL,
    SMALL_TAG,
    Caches,
    assert_loaded,
    assert_refused,
    assert_three_ways_on,
    cached_repository,
    randomised,
    save,
)

TORCHVISION = "torchvision/ResNet18_Weights.IMAGENET1K_V1"


@pytest.fixture(autouse=True)
def caches(no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Caches:
    return Caches.empty(tmp_path, monkeypatch)


@pytest.fixture
def never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that must not be asked."""
    monkeypatch.setattr(huggingface_hub, "get_session", unused_session)


def unused_session() -> None:
    raise AssertionError("the cache holds the weights, and the hub was asked")


def refusing_head(*_: object, **__: object) -> None:
    raise ConnectionError("name resolution failed\nand a second line")


# The host, whatever is asked of it


@pytest.mark.parametrize(
    "address",
    [CACHED_TAG, "timm/legacy_seresnet18.in1k", "hf-hub:someone/cells", "hf-hub:someone/cells@abc", TORCHVISION],
    ids=["timm", "timm by url", "hub", "revision", "torchvision"],
)
def test_a_host_that_refuses_ends_at_once_with_three_ways_on(monkeypatch, address):
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=refusing_head))
    network = create_backbone(SMALL, 3)
    started = time.perf_counter()
    message = assert_refused(network, address, "(name resolution failed)")
    assert time.perf_counter() - started < PATIENCE_BOUND
    assert_three_ways_on(message, address)
    assert not find_source(address).cached()
    with pytest.raises(HubUnreachableError):
        load_pretrained(network, address)


def test_a_host_that_hangs_is_given_up_after_the_patience(monkeypatch):
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


def test_offline_mode_is_said_without_asking(monkeypatch, never_asked):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE is set") as caught:
        load_pretrained(create_backbone(SMALL, 3), CACHED_TAG)
    assert_three_ways_on(str(caught.value), CACHED_TAG)


@pytest.mark.parametrize("status", [403, 404, 502])
def test_a_host_that_answers_with_an_error_counts_as_unreachable(monkeypatch, status):
    answer = SimpleNamespace(status_code=status)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: answer))
    with pytest.raises(HubUnreachableError, match=f"HTTP status {status}") as caught:
        load_pretrained(create_backbone(SMALL, 3), CACHED_TAG)
    assert_three_ways_on(str(caught.value), CACHED_TAG)


@pytest.mark.parametrize("error", [ConnectionError("connection reset"), LocalEntryNotFoundError("connection reset")])
@pytest.mark.parametrize(
    ("address", "owner", "function"),
    [
        (CACHED_TAG, timm, "create_model"),
        ("hf-hub:someone/cells", huggingface_hub, "hf_hub_download"),
        (TORCHVISION, torch.hub, "download_url_to_file"),
    ],
    ids=["timm", "hub", "torchvision"],
)
def test_a_download_that_breaks_off_counts_as_unreachable(monkeypatch, address, owner, function, error):
    def broken(*_: object, **__: object) -> None:
        raise error

    answer = SimpleNamespace(status_code=200)
    network = create_backbone(SMALL, 3)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: answer))
    monkeypatch.setattr(owner, function, broken)
    with pytest.raises(HubUnreachableError, match="the download failed: connection reset") as caught:
        load_pretrained(network, address)
    assert_three_ways_on(str(caught.value), address)


# timm's weights


@pytest.mark.usefixtures("never_asked")
@pytest.mark.parametrize("offline", [False, True])
def test_cached_weights_load_without_asking_the_hub(caches, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    state = randomised(create_backbone("resnet18", 1000))
    save(state, cached_repository(caches.hub, CACHED_TAG) / "model.safetensors")
    network = create_backbone("resnet18", 3)
    report = load_pretrained(network, CACHED_TAG)
    assert_loaded(network, state)
    assert report.lineage == Lineage(CACHED_TAG, CACHED_TAG, "apache-2.0")
    assert report.loaded == 120
    assert find_source(CACHED_TAG).cached()


def test_a_cached_file_that_is_damaged_is_a_mistake_to_mend_not_a_traceback(caches):
    path = cached_repository(caches.hub, SMALL_TAG) / "model.safetensors"
    path.write_bytes(b"cut short")
    assert_refused(create_backbone(SMALL, 3), SMALL_TAG, str(path), "remove it and fetch it again")


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
    assert_loaded(network, pretrained.state_dict())


# torchvision's weights


def fill_torchvision(caches: Caches) -> dict[str, Tensor]:
    state = randomised(models.resnet18())
    caches.torch.mkdir(parents=True)
    save(state, caches.torch / "resnet18-f37072fd.pth")
    return state


@pytest.mark.usefixtures("never_asked")
def test_cached_weights_of_torchvision_load_into_our_network(caches):
    state = fill_torchvision(caches)
    network = create_backbone("resnet18", 3)
    assert load_pretrained(network, TORCHVISION).lineage == Lineage(TORCHVISION, TORCHVISION, None)
    assert_loaded(network, state)
    assert find_source(TORCHVISION).cached()
    assert_refused(create_backbone(SMALL, 3), TORCHVISION, "said to be made for 'resnet18'")


@pytest.mark.parametrize(("version", "resized"), [("V1", 256), ("V2", 232)])
def test_weights_of_torchvision_bring_their_record(version, resized):
    record = preprocessing_record("resnet50", f"torchvision/ResNet50_Weights.IMAGENET1K_{version}")
    assert record == {
        "size": 224,
        "crop": 224 / resized,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "channels": 3,
    }
    assert round(record["size"] / record["crop"]) == resized


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("VGG16_Weights.IMAGENET1K_FEATURES", ("expected weights of torchvision's classifiers",)),  # has no classifier
        ("ResNet50_Weights.IMAGENET1K_V3", ("did you mean ResNet50_Weights.IMAGENET1K_V", "weights --backbone <name>")),
        ("ResNet18_Weight.IMAGENET1K_V1", ("did you mean ResNet18_Weights.IMAGENET1K_V1",)),
        ("resnet18", ("expected weights of torchvision's classifiers",)),
        ("FasterRCNN_ResNet50_FPN_Weights.COCO_V1", ("expected weights of torchvision's classifiers",)),
        ("ResNet50_QuantizedWeights.IMAGENET1K_FBGEMM_V1", ("expected weights of torchvision's classifiers",)),
    ],
)
def test_unknown_weights_of_torchvision_are_refused(name, texts):
    assert_refused(create_backbone(SMALL, 3), f"torchvision/{name}", f"'torchvision/{name}'", *texts)


def test_every_file_of_torchvision_is_named_by_its_digest():
    """Downloads are checked against it."""
    names = [Path(weights.url).stem for _, weights in torchvision_weights().values()]
    assert len(names) > 100
    assert [name for name in names if not re.fullmatch(r".+-[0-9a-f]{8,}", name)] == []


def test_weights_that_come_with_a_licence_have_it():
    licences = {name: find_source(f"torchvision/{name}").facts().licence for name in torchvision_weights()}
    assert {name for name, licence in licences.items() if licence} == {name for name in licences if "SWAG" in name}
    assert {licence for licence in licences.values() if licence} == {"cc-by-nc-4.0"}


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
    assert load_pretrained(network, address).lineage.address == address
    assert_loaded(network, state)
    assert "cell_weights_for_tests" not in sys.modules


def test_a_missing_file_of_an_installed_package_is_named_with_its_near_match(package):
    (package / "small.safetensors").write_bytes(b"")
    address = "package:cell_weights_for_tests/smal.safetensors"
    assert_refused(create_backbone(SMALL, 3), address, f"'{address}'", "did you mean small.safetensors?")


@pytest.mark.parametrize("module", ["absent_cell_weights", "absent_cell_weights.inner"])
def test_a_package_that_is_not_installed_is_named(module):
    address = f"package:{module}/small.safetensors"
    assert_refused(create_backbone(SMALL, 3), address, f"'{address}'", "pip install absent-cell-weights")
