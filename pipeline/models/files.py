"""Files of tensors: read without running code from them, and written with what belongs to the weights."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError

SAFETENSORS = ".safetensors"
#: Kinds of file; all but the first are written by ``torch.save``.
SUFFIXES = (SAFETENSORS, ".pth", ".pt", ".th", ".bin", ".tar", ".ckpt")

# Where training programs put the tensors among other things, the averaged ones first, as timm prefers them.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What a checkpoint of ours says of its task, and what its tensors' names start with.
_OWN_HYPERPARAMETERS = {"classes", "preprocessing", "backbone"}
LINEAGE = "weights_lineage"  # a plain dict in the checkpoint (see `weights.Lineage`)
_TASK_PREFIX = "network."
_LEGACY_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
_METADATA_KEY = "transfer-pipeline"


@dataclass(frozen=True)
class Facts:
    """What a source says of its weights; None where it says nothing.

    Attributes:
        backbone: the architecture.
        preprocessing: the record that belongs to the weights.
        licence: of the weights.
        source: where they came from before any training of ours; None: they are the origin themselves.
        outputs: of the head they were published with; 0: it was left out.
    """

    backbone: str | None = None
    preprocessing: dict[str, Any] | None = None
    licence: str | None = None
    source: str | None = None
    outputs: int | None = None


def is_own_checkpoint(content: Any) -> bool:
    """Whether this is what ``python -m pipeline fit`` writes as a checkpoint."""
    hparams = content.get("hyper_parameters") if isinstance(content, dict) else None
    return (
        isinstance(hparams, dict) and set(hparams) >= _OWN_HYPERPARAMETERS and {LINEAGE, "state_dict"} <= set(content)
    )


def read_facts(path: Path) -> Facts:
    """What a file says of its weights: metadata of our own safetensors files, hyperparameters of our checkpoints.

    Raises:
        UserError: the file is unsafe or damaged.
    """
    if path.suffix != SAFETENSORS:
        # Whatever its suffix, one of ours is a zip archive; then the tensors stay on disk.
        content = _torch_load(path) if zipfile.is_zipfile(path) else {}
        if not is_own_checkpoint(content):
            return Facts()
        hparams = content["hyper_parameters"]
        return Facts(
            hparams["backbone"],
            hparams["preprocessing"],
            content[LINEAGE]["licence"],
            content[LINEAGE]["origin"],
        )
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return Facts(**json.loads(metadata.get(_METADATA_KEY, "{}")))
    except Exception as error:  # the reader has its own type for a damaged file; JSON and fields have theirs
        raise _unreadable(path, error) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors by name, read in a way that cannot run code from the file.

    Args:
        path: one of :data:`SUFFIXES`.

    Returns:
        The tensors, and the name of the entry that held them where the file has other content, too.

    Raises:
        UserError: the file is unsafe, damaged, or holds no tensors by name.
    """
    if path.suffix == SAFETENSORS:
        from safetensors.torch import load_file

        try:
            return load_file(path), None
        except Exception as error:
            raise _unreadable(path, error) from error
    content = _torch_load(path)
    if is_own_checkpoint(content):
        tensors = content["state_dict"]
        return {
            name.removeprefix(_TASK_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_TASK_PREFIX)
        }, "state_dict"
    if _is_state_dict(content):
        return content, None
    for container in _CONTAINERS:
        if isinstance(content, dict) and _is_state_dict(content.get(container)):
            return content[container], container
    raise UserError(
        f"model.weights: expected a state dict (tensors by name), alone or as one of the entries "
        f"{', '.join(_CONTAINERS)}, at '{path}', found {_describe(content)}; save model.state_dict() alone."
    )


def save_weights(path: Path, tensors: Mapping[str, Tensor], facts: Facts) -> None:
    """Write a safetensors file that carries its facts, so that whoever fine-tunes it prepares images as it needs."""
    from safetensors.torch import save_file

    metadata = {"format": "pt", _METADATA_KEY: json.dumps(asdict(facts), ensure_ascii=False)}
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, path, metadata
    )


def _torch_load(path: Path) -> Any:
    try:
        # Mapped where the format allows it: the optimizer's state in a checkpoint is then never read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise _unreadable(path, error) from error


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    )


def _describe(content: Any) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    return f"a dict with {', '.join(repr(key) for key in list(content)[:5])}" if content else "an empty dict"


def _unreadable(path: Path, error: Exception) -> UserError:
    # Each reader has its own exception types for a damaged or unsafe file; all mean the same to the person.
    if "weights_only" in str(error) and _is_torch_file(path):
        return UserError(
            f"model.weights: expected a file of tensors at '{path}', found one that holds other objects than tensors; "
            "reading those runs code from the file, and is refused. If you trust where it comes from, convert it once: "
            "state = torch.load(file, weights_only=False); "
            "safetensors.torch.save_file(state['state_dict'], 'weights.safetensors')."
        )
    return UserError(
        f"model.weights: expected a file of tensors at '{path}', found one that cannot be read ({first_line(error)}); "
        "fetch or save it again, best as safetensors: "
        "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')."
    )


def _is_torch_file(path: Path) -> bool:
    """Whether ``torch.save`` wrote it: a zip archive or, before torch 1.6, a pickle that begins with its number."""
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or _LEGACY_MAGIC in file.read(32)


def first_line(error: Exception) -> str:
    """The first line of what an exception says, for a message of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
