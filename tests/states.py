"""State dicts for the tests of weights, where they can be found, and what must hold of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.weights import load_pretrained

SMALL = "timm/test_resnet"  # half a million parameters, with norms and a head named `fc`
SMALL_TAG = "timm/test_resnet.r160_in1k"
CACHED_TAG = "timm/resnet18.a1_in1k"
PATIENCE_BOUND = 5.0  # seconds; timm itself would retry for about 50
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


def save(state: dict[str, Tensor], path: Path) -> str:
    """Write a file of the kind that its suffix says; its address."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in found.items():
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value, expected[key]), key


def assert_loaded(network: nn.Module, state: dict[str, Tensor], head: str = "fc.") -> None:
    """All but the head is what the state dict says."""
    found = network.state_dict()
    body = [key for key in found if not key.startswith(head)]
    assert 0 < len(body) < len(found)
    for key in body:
        assert torch.equal(found[key], state[key]), key


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


def assert_three_ways_on(message: str, address: str) -> None:
    """The error for weights that are neither cached nor to be had says what can be done."""
    assert f"'{address}'" in message
    assert "unreachable" in message
    assert "path/to/file.safetensors" in message
    assert "fill the cache" in message
    assert constants.HF_HUB_CACHE in message
    assert torch.hub.get_dir() in message
    assert "model.weights: null" in message
    assert "model.weights_fallback: scratch" in message


@dataclass(frozen=True)
class Caches:
    """Folders where the hub's client and torch keep what they fetched; they need not exist yet."""

    hub: Path
    torch: Path

    @classmethod
    def empty(cls, folder: Path, monkeypatch: pytest.MonkeyPatch) -> "Caches":
        """Two empty ones, which are used until the test ends."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
        return cls(folder / "hub", folder / "torch" / "hub" / "checkpoints")


def cached_repository(cache: Path, repository: str, ref: str = "main", commit: str = COMMIT) -> Path:
    """The folder where the hub's client would have put the files of a repository, and pointed to it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[str]:
    """A host on this machine that has some files by path, and says of others what the model hub says; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            found = self.path in files
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(files.get(self.path, b""))))
            self.send_header("ETag", f'"{self.path.strip("/").replace("/", "-")}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *_: object) -> None:
            """Nothing: requests are no output of a test."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
