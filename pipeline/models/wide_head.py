"""A classifier that sees several stages of a network of timm's, as :class:`~pipeline.models.resnet.ResNet` has its own.

The network keeps its parts and their names; what it makes of an image goes another way at the end.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SeesSeveralStages(nn.Module):
    """Goes before the class of a network whose head :func:`widen_head` has widened."""

    head_name: str
    #: How many stages the classifier sees.
    head_stages: int
    #: Features that it sees of each of them.
    head_widths: list[int]
    head_dropout: nn.Dropout

    def forward_head(self, maps: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Maps to logits, or with ``pre_logits`` to what logits are made of, side by side.

        Args:
            maps: of the last ``head_stages`` stages or more, from low to high: of earlier ones ``(N, C, h, w)``, of the
                last what ``forward_features`` makes.
            pre_logits: features instead of logits.

        Returns:
            ``(N, num_classes)``, or features ``(N, F)``.
        """
        *earlier, last = maps[-self.head_stages :]
        means = [stage_map.mean((2, 3)) for stage_map in earlier]
        features = torch.cat([*means, super().forward_head(last, pre_logits=True)], dim=1)  # type: ignore[misc]
        features = self.head_dropout(features)
        return features if pre_logits else self.get_submodule(self.head_name)(features)

    def forward(self, images: Tensor) -> Tensor:
        last, maps = self.forward_intermediates(images, indices=self.head_stages)  # type: ignore[operator]
        return self.forward_head([*maps[:-1], last])

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., nn.Module], tuple[type], dict[str, Any]]:
        # Its class has no name by which another process would find it.
        return _empty, (type(self).__bases__[1],), self.__dict__


def tells_stages(network: nn.Module, stages: int) -> bool:
    """Whether so many of the last maps of a network of timm's can be had, and are of as many sizes.

    Maps of one size, as a transformer's blocks make them, are no stages: all have passed the same.
    """
    records = getattr(network, "feature_info", ())
    if not hasattr(network, "forward_intermediates") or len(records) < stages:
        return False
    return len({records[number]["reduction"] for number in range(-stages, 0)}) == stages


def widen_head(network: nn.Module, name: str, stages: int, dropout: float) -> None:
    """Put a fresh classifier that sees several stages in the place of a network's own.

    Args:
        network: of timm's, without dropout of its own, for which :func:`tells_stages` is true; changed in place.
        name: of its classifier, which is linear in what timm calls the network's features.
        stages: how many, at least 2.
        dropout: share of the features zeroed before the head while training.
    """
    head = network.get_submodule(name)
    assert isinstance(head, nn.Linear)
    earlier = [network.feature_info[number]["num_chs"] for number in range(-stages, -1)]  # type: ignore[index]
    network.head_name = name  # type: ignore[assignment]
    network.head_stages = stages  # type: ignore[assignment]
    network.head_widths = [*earlier, head.in_features]  # type: ignore[assignment]
    network.head_dropout = nn.Dropout(dropout)
    network.set_submodule(name, nn.Linear(sum(network.head_widths), head.out_features))  # type: ignore[arg-type]
    network.__class__ = _seeing_several_stages(type(network))


def _seeing_several_stages(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"{kind.__name__}OfSeveralStages", (SeesSeveralStages, kind), {})


def _empty(kind: type[nn.Module]) -> nn.Module:
    """A network of such a kind, whose contents are still to come."""
    wide = _seeing_several_stages(kind)
    return wide.__new__(wide)
