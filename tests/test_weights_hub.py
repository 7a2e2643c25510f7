"""Repositories of the model hub, in its cache or fetched from a host on this machine; and torchvision's downloads."""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from torch import Tensor
from torchvision import models

from pipeline.errors import UserError
from pipeline.models.backbones import create_backbone, default_preprocessing
from pipeline.models.hub import HubUnreachableError
from pipeline.models.sources import find_source
from pipeline.models.weights import Lineage, load_pretrained, preprocessing_record
from tests.states import (
    COMMIT,
    SMALL,
    Caches,
    assert_loaded,
    assert_refused,
    cached_repository,
    randomised,
    save,
    serving,
)

TORCHVISION = "torchvision/ResNet18_Weights.IMAGENET1K_V1"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Caches:
    """Empty ones; and no network, but for tests that ask for a host on this machine."""
    if "host" not in request.fixturenames:
        request.getfixturevalue("no_network")
    return Caches.empty(tmp_path, monkeypatch)


@pytest.fixture
def never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that must not be asked."""

    def unused_session() -> None:
        raise AssertionError("the cache holds the weights, and the hub was asked")

    monkeypatch.setattr(huggingface_hub, "get_session", unused_session)


# Repositories in the cache

NESTED = {
    "architecture": "test_resnet",
    "num_classes": 7,
    "pretrained_cfg": {
        "input_size": [3, 96, 96],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "license": "cc-by-nc-4.0",
    },
}
FLAT = {"architecture": "test_resnet", "num_classes": 7, **NESTED["pretrained_cfg"]}
RECORD = {
    "size": 96,
    "crop": 0.9,
    "interpolation": "bicubic",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "channels": 3,
}
ADDRESS = "hf-hub:someone/cells.v1"


def fill(caches: Caches, config: object, name: str = "model.safetensors", **place: str) -> dict[str, Tensor]:
    """A cached repository with weights and, unless it is None, a config.json."""
    folder = cached_repository(caches.hub, "someone/cells.v1", **place)
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    state = randomised(create_backbone(SMALL, 7), seed=len(str(place)))
    save(state, folder / name)
    return state


@pytest.mark.usefixtures("never_asked")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("config", [NESTED, FLAT], ids=["nested", "flat"])
def test_a_cached_repository_says_how_images_are_prepared_and_under_which_licence(caches, config, name):
    state = fill(caches, config, name)
    network = create_backbone(SMALL, 3)
    assert preprocessing_record(SMALL, ADDRESS) == RECORD != default_preprocessing(SMALL)
    assert load_pretrained(network, ADDRESS).lineage == Lineage(ADDRESS, ADDRESS, "cc-by-nc-4.0")
    assert_loaded(network, state)
    assert find_source(ADDRESS).cached()
    assert_refused(create_backbone("resnet20", 3), ADDRESS, "said to be made for 'test_resnet'")


@pytest.mark.usefixtures("never_asked")
def test_a_revision_is_the_one_that_is_named(caches):
    main = fill(caches, NESTED)
    other = fill(caches, {**NESTED, "pretrained_cfg": {"crop_pct": 1.0, "std": [1, 1, 1]}}, ref="abc", commit="a" * 40)
    for revision, state, crop in (
        ("", main, 0.9),
        ("@main", main, 0.9),
        ("@abc", other, 1.0),
        ("@" + "a" * 40, other, 1),
    ):
        network = create_backbone(SMALL, 3)
        assert load_pretrained(network, ADDRESS + revision).lineage.address == ADDRESS + revision
        assert_loaded(network, state)
        assert preprocessing_record(SMALL, ADDRESS + revision)["crop"] == crop
    assert not torch.equal(main["bn1.weight"], other["bn1.weight"])


@pytest.mark.usefixtures("never_asked")
def test_the_safe_format_is_preferred(caches):
    folder = cached_repository(caches.hub, "someone/cells.v1")
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"of no use")
    state = randomised(create_backbone(SMALL, 7))
    save(state, folder / "model.safetensors")
    network = create_backbone(SMALL, 3)
    load_pretrained(network, ADDRESS)
    assert_loaded(network, state)


@pytest.mark.usefixtures("never_asked")
@pytest.mark.parametrize("config", [{}, {"architectures": ["ResNetForImageClassification"], "num_channels": 3}])
def test_a_description_of_another_kind_leaves_the_record_to_the_backbone(caches, config):
    fill(caches, config)
    assert preprocessing_record(SMALL, ADDRESS) == default_preprocessing(SMALL)
    assert load_pretrained(create_backbone(SMALL, 3), ADDRESS).lineage.licence is None


def test_cached_weights_without_a_description_load_where_the_hub_is_out_of_reach(caches, monkeypatch):
    def refusing_head(*_: object, **__: object) -> None:
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=refusing_head))
    state = fill(caches, config=None)
    network = create_backbone(SMALL, 3)
    assert load_pretrained(network, ADDRESS).lineage == Lineage(ADDRESS, ADDRESS, None)
    assert_loaded(network, state)
    assert preprocessing_record(SMALL, ADDRESS) == default_preprocessing(SMALL)


@pytest.mark.usefixtures("never_asked")
@pytest.mark.parametrize(
    "config", ['{"pretrained_cfg": ', "[]", '"flat"', '{"input_size": 224}', '{"mean": 0.5}', '{"pretrained_cfg": 1}']
)
def test_a_damaged_description_is_named_with_its_file(caches, config):
    fill(caches, config)
    path = str(caches.hub / "models--someone--cells.v1" / "snapshots" / COMMIT / "config.json")
    message = assert_refused(create_backbone(SMALL, 3), ADDRESS, f"'{ADDRESS}'", "config.json", path)
    with pytest.raises(UserError, match="cannot be read") as caught:
        preprocessing_record(SMALL, ADDRESS)
    assert str(caught.value) == message


@pytest.mark.parametrize("address", ["hf-hub:", "hf-hub:resnet18", "hf-hub:a/b/c", "hf-hub:a b/c", "hf-hub:@main"])
def test_an_address_without_an_owner_is_refused(never_asked, address):
    assert_refused(create_backbone(SMALL, 3), address, "expected hf-hub:<owner>/<repository>", f"'{address}'")


# Downloads from a host on this machine


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Files by path, and the address they are served at."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    files: dict[str, bytes] = {}
    with serving(files) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield SimpleNamespace(files=files, url=url)


def as_bytes(state: dict[str, Tensor]) -> bytes:
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


def offered(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, content: bytes, digest: str) -> None:
    host.files[f"/models/resnet18-{digest}.pth"] = content
    member = models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(member.value, "url", f"{host.url}/models/resnet18-{digest}.pth")


def test_weights_of_torchvision_are_fetched_once(host, caches, monkeypatch):
    state = randomised(models.resnet18())
    content = as_bytes(state)
    digest = hashlib.sha256(content).hexdigest()[:8]
    offered(host, monkeypatch, content, digest)
    network = create_backbone("resnet18", 3)
    load_pretrained(network, TORCHVISION)
    assert_loaded(network, state)
    assert [path.name for path in caches.torch.iterdir()] == [f"resnet18-{digest}.pth"]
    host.files.clear()
    load_pretrained(network, TORCHVISION)


def test_a_download_with_another_digest_is_refused_and_leaves_nothing(host, caches, monkeypatch):
    offered(host, monkeypatch, as_bytes(randomised(models.resnet18())), digest="0badf00d")
    assert_refused(create_backbone("resnet18", 3), TORCHVISION, "SHA-256 begins with 0badf00d")
    # It must not pass for a host out of reach, which may be answered by training from scratch.
    with pytest.raises(UserError) as caught:
        load_pretrained(create_backbone("resnet18", 3), TORCHVISION)
    assert not isinstance(caught.value, HubUnreachableError)
    assert list(caches.torch.iterdir()) == []
    host.files.clear()
    assert_refused(create_backbone("resnet18", 3), TORCHVISION, "HTTP status 404")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("described", [True, False])
def test_a_repository_is_fetched_with_its_description_if_it_has_one(host, caches, tmp_path, name, described):
    state = randomised(create_backbone(SMALL, 7))
    folder = "/someone/cells.v1"
    save(state, tmp_path / name)
    host.files |= {folder: b"", f"{folder}/resolve/main/{name}": (tmp_path / name).read_bytes()}
    if described:
        host.files[f"{folder}/resolve/main/config.json"] = json.dumps(NESTED).encode()
    record = preprocessing_record(SMALL, ADDRESS)
    network = create_backbone(SMALL, 3)
    report = load_pretrained(network, ADDRESS)
    assert_loaded(network, state)
    assert record == (RECORD if described else default_preprocessing(SMALL))
    assert report.lineage.licence == ("cc-by-nc-4.0" if described else None)
    host.files.clear()
    load_pretrained(network, ADDRESS)


def test_a_repository_without_weights_is_refused(host):
    host.files |= {"/someone/cells.v1": b"", "/someone/cells.v1/resolve/main/config.json": b"{}"}
    message = assert_refused(create_backbone(SMALL, 3), ADDRESS, "expected model.safetensors or pytorch_model.bin")
    assert "unreachable" not in message
