"""Published files: in a local cache, or fetched from a host that is first asked whether it answers."""

import threading
from pathlib import Path
from urllib.parse import urlparse

import torch

from pipeline.errors import UserError
from pipeline.models.files import first_line

#: How long a host may take to give a sign of life before it counts as unreachable, in seconds.
HUB_PATIENCE_SECONDS = 4.0
#: Names under which the model hub keeps weights, the safe format first.
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class HubUnreachableError(UserError):
    """The weights are not in the local cache and could not be fetched."""


def cached_in_hub(repository: str, names: tuple[str, ...], revision: str | None = None) -> Path | None:
    """The first of some files of a hub repository that the local cache has."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def fetch_from_hub(repository: str, names: tuple[str, ...], revision: str | None, address: str) -> Path:
    """The first of some files that a hub repository has, from the local cache or the hub.

    Raises:
        HubUnreachableError: it is not cached, and the hub cannot be reached or has no such repository.
        UserError: the repository has none of the files.
    """
    cached = cached_in_hub(repository, names, revision)
    if cached is not None:
        return cached
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    require_host(f"{constants.ENDPOINT}/{repository}", address)
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except Exception as error:  # its client has many types for broken downloads
            # One of them passes for a file that is not there: the connection broke before the hub could say.
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            raise unreachable(address, f"the download failed: {first_line(error)}") from error
    raise UserError(
        f"model.weights: expected {' or '.join(names)} in '{address}', found neither; choose another repository."
    )


def cached_download(url: str) -> Path:
    """Where torch keeps, or would keep, a file downloaded from an address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def fetch_download(url: str, address: str) -> Path:
    """A file from torch's cache or its address.

    Raises:
        HubUnreachableError: it is not cached and cannot be fetched.
        UserError: what was fetched has another digest than its name says; it is not kept.
    """
    path = cached_download(url)
    if path.is_file():
        return path
    require_host(url, address)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Published names end with the first digits of the file's digest, as in resnet18-f37072fd.pth.
    digest = path.stem.rpartition("-")[2]
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
    except Exception as error:
        if "invalid hash value" in str(error):  # not a host out of reach: training from scratch would hide it
            raise UserError(
                f"model.weights: expected a file whose SHA-256 begins with {digest} for '{address}', found another "
                f"({first_line(error)}); nothing was kept, fetch it again or report it to the publisher."
            ) from error
        raise unreachable(address, f"the download failed: {first_line(error)}") from error
    return path


def require_host(url: str, address: str) -> None:
    """Raise unless a host answers soon; the clients that download would retry for most of a minute.

    The question runs in a thread of its own, because a name lookup cannot be given a time limit.

    Raises:
        HubUnreachableError: there was no good answer within :data:`HUB_PATIENCE_SECONDS`.
    """
    from huggingface_hub import constants, get_session

    outcome = [f"no answer within {HUB_PATIENCE_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            status = get_session().head(url, timeout=HUB_PATIENCE_SECONDS).status_code
            outcome.append(f"it answered with HTTP status {status}" if status >= 400 else "")
        except Exception as error:  # whatever it is, it means: no sign of life
            outcome.append(first_line(error))

    if constants.HF_HUB_OFFLINE:
        outcome.append("HF_HUB_OFFLINE is set")
    else:
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(HUB_PATIENCE_SECONDS)
    if why := outcome[-1]:
        raise unreachable(address, why)


def unreachable(address: str, why: str) -> HubUnreachableError:
    """The error for weights that are neither cached nor to be had, with three ways on."""
    from huggingface_hub import constants

    return HubUnreachableError(
        f"model.weights: expected to fetch '{address}', found its host unreachable ({why}) and the weights not in the "
        f"local caches ({constants.HF_HUB_CACHE}, {torch.hub.get_dir()}). Three ways on: give a local file "
        "(model.weights: path/to/file.safetensors); fill the cache on a machine with network and copy it here; or "
        "train without weights (model.weights: null, or model.weights_fallback: scratch)."
    )
