"""Loading pretrained weights strictly: every tensor of the network is accounted for, or nothing is changed.

Addresses are those of :mod:`~pipeline.models.sources`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.backbones import default_preprocessing, first_convolution, head_name
from pipeline.models.files import Facts
from pipeline.models.renaming import rename_foreign_keys, unwrap
from pipeline.models.sources import find_source, is_non_commercial


@dataclass(frozen=True)
class Lineage:
    """Where a model's weights come from; kept in checkpoints, because a licence binds what is trained from them.

    Attributes:
        address: where training started.
        origin: what was there before any training of ours; differs where a model of ours was trained further.
        licence: of the origin; None: none was stated.
    """

    address: str = "scratch"
    origin: str = "scratch"
    licence: str | None = None

    def __str__(self) -> str:
        return self.address if not self.trained_here else f"{self.address} (from {self.origin})"

    @property
    def trained_here(self) -> bool:
        """Whether a training of ours came between, on images of which nothing is known any more."""
        return self.address != self.origin

    @property
    def licence_in_words(self) -> str:
        """The licence's name, and whether it is known to exclude commercial use."""
        if self.licence is None:
            return "not stated"
        return f"{self.licence} (non-commercial)" if is_non_commercial(self.licence) else self.licence


@dataclass(frozen=True)
class LoadReport:
    """What a source gave to a network.

    Attributes:
        lineage: of the weights.
        loaded: number of tensors copied.
        skipped: names in the file that were left out: its head.
        adapted: what was changed to fit, in words.
        unwrapped: what was taken off to get at the tensors, in words.
        new_head: name of the classifier, which keeps its fresh values.
    """

    lineage: Lineage
    loaded: int
    skipped: tuple[str, ...]
    adapted: tuple[str, ...]
    unwrapped: tuple[str, ...]
    new_head: str

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded"]
        parts += [f"skipped {', '.join(self.skipped)}"] if self.skipped else []
        parts += [*self.adapted, *self.unwrapped]
        return f"{'; '.join(parts)}; head '{self.new_head}' starts fresh"


def preprocessing_record(backbone: str, weights: str | None) -> dict[str, Any]:
    """The preprocessing that belongs to weights; where they say nothing, or there are none, to the backbone.

    Needs no network, but for a small file of a ``hf-hub:`` repository that is not in the local cache.

    Raises:
        UserError: backbone or weights are unknown, or the file is unsafe or damaged.
    """
    default = default_preprocessing(backbone)
    own = None if weights is None else find_source(weights).facts().preprocessing
    return default if own is None else own


def load_pretrained(network: nn.Module, weights: str) -> LoadReport:
    """Copy pretrained weights into a network, all but its head.

    The head is skipped by name, whatever its shape: the file's classes are not the user's. Half-precision tensors are
    widened to the parameters' own type. Where the first convolution takes another number of channels, it is adapted
    (see :func:`adapt_input_channels`).

    Args:
        network: changed in place.
        weights: an address.

    Raises:
        UserError: the file is missing, unsafe or damaged, or any tensor outside the head is missing, unexpected, of
            another shape or kind, or not finite; the network is then unchanged.
        HubUnreachableError: the weights' host gave no sign of life in time.
    """
    source = find_source(weights)
    state, container = source.tensors()
    facts = source.facts()
    state, prefix = unwrap(state, network)
    state = rename_foreign_keys(state, network)
    head = head_name(network)
    target = _without_head(network.state_dict(), head)
    given = _without_head(state, head)
    adapted = _adapt(given, target, first_convolution(network))
    _require_same(given, target, weights, facts)
    network.load_state_dict(given, strict=False)  # strict but for the head: compared just above
    return LoadReport(
        lineage=Lineage(weights, facts.source or weights, facts.licence),
        loaded=len(given),
        skipped=tuple(name for name in state if name not in given),
        adapted=adapted,
        unwrapped=(*((f"found in '{container}'",) if container else ()), *((f"without '{prefix}'",) if prefix else ())),
        new_head=head,
    )


def adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution for another number of input channels, with the same sum over them.

    So one normalised channel, given to each of the new inputs, makes the features that it made on all of the old
    ones: for one channel the filters are added up; of more channels than before, each old filter serves several
    in turn (R, G, B, R, ...), which share its weight.

    Args:
        weight: ``(out_channels, in_channels, height, width)``.
        channels: wanted number of input channels.

    Returns:
        ``(out_channels, channels, height, width)``.

    Example:
        >>> rgb = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
        >>> adapt_input_channels(rgb, 1).flatten().tolist(), adapt_input_channels(rgb, 4).flatten().tolist()
        ([6.0], [0.5, 2.0, 3.0, 0.5])
    """
    before = weight.shape[1]
    if channels <= before:
        folded = weight.new_zeros(weight.shape[0], channels, *weight.shape[2:])
        return folded.index_add(1, torch.arange(before) % channels, weight)
    turn = torch.arange(channels) % before
    shares = torch.bincount(turn)[turn].to(weight.dtype)
    return weight[:, turn] / shares.view(1, -1, 1, 1)


def _without_head(state: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(f"{head}.")}


def _adapt(given: dict[str, Tensor], target: dict[str, Tensor], first: str | None) -> tuple[str, ...]:
    """Fit the first convolution of ``given`` to the target's input channels, in place; what was done, in words."""
    name = f"{first}.weight"
    if name not in given or name not in target:
        return ()
    found, wanted = given[name].shape, target[name].shape
    if found == wanted or len(found) != 4 or (found[0], *found[2:]) != (wanted[0], *wanted[2:]):
        return ()
    if not _same_kind(given[name], target[name]):
        return ()
    given[name] = adapt_input_channels(given[name].float(), wanted[1])
    return (f"adapted {name} from {found[1]} to {wanted[1]} input channels",)


def _same_kind(given: Tensor, target: Tensor) -> bool:
    """Whether the values can be copied: dense in memory, and numbers with a fraction where these are expected."""
    dense = given.layout == torch.strided and not given.is_meta
    return dense and given.is_floating_point() == target.is_floating_point()


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    return f"{tensor.dtype}{layout}{' without values' if tensor.is_meta else ''}"


def _require_same(given: dict[str, Tensor], target: dict[str, Tensor], address: str, facts: Facts) -> None:
    common = [name for name in target if name in given]
    strange = [name for name in common if not _same_kind(given[name], target[name])]
    problems = {
        # Files from before torch 0.4.1 do not count batches; the count only matters to a cumulative average.
        "missing": [name for name in target if name not in given and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in given if name not in target],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(target[name].shape)}"
            for name in common
            if given[name].shape != target[name].shape
        ],
        "of another kind": [f"{name} {_kind(given[name])} instead of {_kind(target[name])}" for name in strange],
        # In the network's own type: a double may be too large for it.
        "not finite": [
            name for name in common if name not in strange and not given[name].to(target[name].dtype).isfinite().all()
        ],
    }
    found = "; ".join(
        f"{len(names)} {problem}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for problem, names in problems.items()
        if names
    )
    if found:
        made_for = f" The weights are said to be made for '{facts.backbone}'." if facts.backbone else ""
        raise UserError(
            f"model.weights: expected the {len(target)} tensors of this backbone in '{address}', found {found}."
            f"{made_for} Set model.backbone to the architecture that they were trained with."
        )
