"""Features of a frozen network, computed once an image and kept on disk."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.finetuning.room import UNFINISHED, WHOLE, make_room, note_use
from pipeline.models import backbones
from pipeline.models.modes import evaluating

Floats = NDArray[np.float32]

_DIGEST_BYTES = 32
_IMAGES_A_FILE = 1024  # lost at most by a process that is killed
_FORMAT = 1  # part of every key: raise it when features of the same name would mean something else


class FeatureStore:
    """Features on disk, found by the image, its view, the network and the preprocessing.

    A file is written under a name of its own, becomes visible when it is complete, and never changes: several processes
    can write at once, and one that is killed leaves nothing half done in sight. What has been damaged is noticed by its
    checksum, removed, and computed again. Nothing in a file is run.

    Args:
        folder: where all features are kept, of whatever network; it is made where there is none.
        network: what :func:`network_digest` says.
        record: whatever else the features depend on, in plain types: the backbone's name (two architectures can have
            the same tensors), preprocessing, and of augmented views transforms and seed.
    """

    def __init__(self, folder: Path, network: str, record: Mapping[str, Any]) -> None:
        identity = json.dumps([_FORMAT, network, record], sort_keys=True)
        self._identity = hashlib.sha256(identity.encode()).digest()
        self.folder = folder / self._identity.hex()[:32]

    def read(self, images: Sequence[str], view: int = 0) -> dict[str, Floats]:
        """The features ``(F,)`` of those images that are there.

        Args:
            images: digests of their contents.
            view: which of several looks at the same image.
        """
        note_use(self.folder)
        wanted = {self._key(image, view): image for image in images}
        found: dict[str, Floats] = {}
        for file in sorted(self.folder.glob(f"*{WHOLE}")):
            for key, features in self._read_file(file):
                if key in wanted:
                    found[wanted[key]] = features
        return found

    def write(self, images: Sequence[str], features: Floats, view: int = 0) -> None:
        """Keep features.

        Args:
            images: digests of their contents, ``N``.
            features: ``(N, F)``.
            view: which of several looks at the same images.

        Raises:
            UserError: the folder cannot be written.
        """
        keys = np.frombuffer(b"".join(self._key(image, view) for image in images), np.uint8)
        content = save(
            {"keys": keys.reshape(-1, _DIGEST_BYTES), "features": np.ascontiguousarray(features, np.float32)}
        )
        name = uuid.uuid4().hex  # from the operating system: two processes never choose the same
        unfinished = self.folder / f"{name}{UNFINISHED}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with unfinished.open("wb") as file:
                    file.write(self._checksum(content) + content)
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.replace(self.folder / f"{name}{WHOLE}")
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"features: expected to keep them in '{self.folder}', found {error.strerror}; make room or choose "
                "another folder."
            ) from error

    def _key(self, image: str, view: int) -> bytes:
        return hashlib.sha256(f"{image} {view}".encode()).digest()

    def _checksum(self, content: bytes) -> bytes:
        # With the identity, so that a file that was moved here from elsewhere counts as damaged.
        return hashlib.sha256(self._identity + content).digest()

    def _read_file(self, file: Path) -> Iterator[tuple[bytes, Floats]]:
        try:
            whole = file.read_bytes()
        except OSError:  # another process has just found it damaged; or it cannot be read, and is computed again
            return
        checksum, content = whole[:_DIGEST_BYTES], whole[_DIGEST_BYTES:]
        if checksum != self._checksum(content):
            file.unlink(missing_ok=True)
            return
        try:
            arrays = load(content)
        except SafetensorError:  # right as far as the checksum goes, and still nothing that this program wrote
            return
        for key, features in zip(arrays["keys"], arrays["features"], strict=True):
            yield key.tobytes(), features


def network_digest(network: nn.Module) -> str:
    """SHA-256 of every tensor that features depend on: all of the network's parameters and buffers but its head's.

    Args:
        network: from :func:`~pipeline.models.backbones.create_backbone`.
    """
    head = f"{backbones.head_name(network)}."
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not name.startswith(head):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def extract_features(
    network: nn.Module,
    embed: Callable[[Tensor], Tensor],
    read_images: Callable[[Sequence[int]], Iterable[Tensor]],
    digests: Sequence[str],
    store: FeatureStore,
    view: int = 0,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Floats:
    """Features of all images, computed where the store has none, in evaluation mode and without gradients.

    The network sees batches of one size (the last is filled up), whichever images are missing, so that on a processor
    an image has the same features, bit for bit, whatever it is computed with; on a GPU they may differ by rounding
    where another algorithm is chosen. What comes out of the store is bit for bit what went in. Identical images are
    computed once. Where some were computed, stores beside this one may have to go
    (:func:`~pipeline.finetuning.room.make_room`).

    Args:
        network: put into evaluation mode meanwhile; afterwards each of its modules is in the mode that it was in.
        embed: from uint8 images ``(B, C, H, W)`` to features ``(B, F)``; scales, normalises and moves them as needed.
        read_images: from row numbers to these images in this order, in batches ``(B, C, H, W)`` of any size.
        digests: of each image's content, ``N``.
        store: where features are kept.
        view: which look at the images ``read_images`` gives; 0 is the one without augmentation.
        batch_size: images at a time.
        progress: called with how many images are done, and of how many.

    Returns:
        float32 ``(N, F)``; ``(0, 0)`` where there are no images.

    Raises:
        UserError: the store cannot be written, or features are not finite.
        ValueError: ``read_images`` or ``embed`` gave another number than was asked for.
    """
    known = store.read(digests, view)
    rows = list({digest: row for row, digest in reversed(list(enumerate(digests))) if digest not in known}.values())
    rows.sort()
    if progress is not None:
        progress(len(digests) - len(rows), len(digests))
    unsaved: dict[str, Floats] = {}
    done = 0
    with evaluating(network), torch.inference_mode():
        for batch in in_batches(read_images(rows) if rows else [], batch_size):
            here = [digests[row] for row in rows[done : done + len(batch)]]
            unsaved |= zip(here, _embed(embed, batch, batch_size), strict=True)
            done += len(batch)
            if len(unsaved) >= _IMAGES_A_FILE or done == len(rows):
                store.write(list(unsaved), np.stack(list(unsaved.values())), view)
                known |= unsaved
                unsaved = {}
            if progress is not None:
                progress(len(digests) - len(rows) + done, len(digests))
    if done != len(rows):
        raise ValueError(f"expected {len(rows)} images from read_images, found {done}")
    if rows:
        make_room(store.folder.parent)
    return np.stack([known[digest] for digest in digests]) if digests else np.zeros((0, 0), np.float32)


def task_features(
    task: Any,
    read_images: Callable[[Sequence[int]], Iterable[Tensor]],
    digests: Sequence[str],
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    precision: str = "32-true",
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    turn: tuple[str, Callable[[Tensor], Tensor]] | None = None,
    part: tuple[str, Callable[[nn.Module, Tensor], Tensor]] | None = None,
) -> Floats:
    """Features of images as a task's network sees them, on the device that it is on (see :func:`extract_features`).

    Args:
        task: a :class:`~pipeline.task.ClassificationTask`.
        read_images: from row numbers to uint8 (or uint16, float32) images ``(B, C, H, W)``.
        digests: of each image's content, ``N``.
        folder: where features are kept.
        progress: called with how many images are done, and of how many.
        precision: as the trainer names it; features of another one are others.
        computing: context in which the network computes in that precision.
        turn: what is done to images ``(B, C, H, W)`` before the network sees them, and what that is called.
        part: what is taken from the network, ``(B, F)`` of normalised images, and what that is called; none: what its
            head classifies.

    Returns:
        float32 ``(N, F)``.

    Raises:
        UserError: the folder cannot be written, or features are not finite.
    """
    network, hparams = task.network, task.hparams
    record = {"backbone": hparams["backbone"], "preprocessing": hparams["preprocessing"], "precision": precision}
    if turn is not None:
        record["turn"] = turn[0]
    if part is not None:
        record["part"] = part[0]
    elif hparams["head_stages"] > 1:
        record["head_stages"] = hparams["head_stages"]
    take = backbones.features if part is None else part[1]

    def embed(images: Tensor) -> Tensor:
        with computing():
            moved = images.to(task.device)
            return take(network, task.normalise(moved if turn is None else turn[1](moved)))

    store = FeatureStore(folder, network_digest(network), record)
    return extract_features(network, embed, read_images, digests, store, progress=progress)


def in_batches(parts: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same images in batches of ``size``; the last may be smaller."""
    rest: Tensor | None = None
    for part in parts:
        rest = part if rest is None else torch.cat([rest, part])
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
    if rest is not None and len(rest):
        yield rest


def _embed(embed: Callable[[Tensor], Tensor], batch: Tensor, size: int) -> Floats:
    filled = torch.cat([batch, batch[:1].expand(size - len(batch), -1, -1, -1)])
    features = embed(filled)
    if features.ndim != 2 or len(features) != size:
        raise ValueError(f"expected features of shape ({size}, F) from embed, found {tuple(features.shape)}")
    numbers = features.float().cpu().numpy()[: len(batch)]
    if not np.isfinite(numbers).all():
        raise UserError(
            "features: expected finite numbers from the network, found others; its weights are damaged, or they need "
            "another precision (--trainer.precision=32-true)."
        )
    return numbers
