"""Whether an image is of the kind that was trained on, said as a share of held-out images that are no less strange."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Below this an image counts as strange; of images of the kind that was trained on, such a share does.
STRANGE = 0.05

_LEAST_SPREAD = 1e-6


class Familiarity(nn.Module):
    """How usual an image is among those that a network was trained on, in (0, 1].

    At each of the network's last stages an image is as far from the training images as its mean activations are from
    the nearest of theirs, by cosine (neighbours: Sun et al. 2022, https://arxiv.org/abs/2204.06507; several stages: Lee
    et al. 2018, https://arxiv.org/abs/1807.03888). The last stage alone would not do: fine-tuned, it keeps little but
    what tells the classes apart, and takes much for one of them that is plainly something else. Distances are counted
    in standard deviations of held-out images and added up. What is said of an image is the share of held-out images
    that are as far away or farther, itself counted as one of them: a conformal p-value (Bates et al. 2023,
    https://arxiv.org/abs/2104.08279). Of images that come as the held-out ones did, a share ``x`` at most gets ``x`` or
    less, whatever the network (but for how much epoch and scales, which the same images have chosen, suit them).

    Args:
        references: directions of training images at each stage, ``(R, F)`` of unit length, F differing by stage.
        centre: mean distance of held-out images from them at each stage, ``(stages, 1)``.
        spread: standard deviation of that distance, ``(stages, 1)``.
        usual: how far held-out images are away over all stages, ``(M,)``.
    """

    centre: Tensor
    spread: Tensor
    usual: Tensor

    def __init__(self, references: Sequence[Tensor], centre: Tensor, spread: Tensor, usual: Tensor) -> None:
        super().__init__()
        self._stages = len(references)
        named = {f"references_{number}": stage for number, stage in enumerate(references)}
        for name, tensor in {**named, "centre": centre, "spread": spread, "usual": usual}.items():
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def measured(cls, trained: Sequence[Tensor], held_out: Sequence[Tensor]) -> "Familiarity":
        """From what a network makes of images (see :func:`~pipeline.models.backbones.describe`).

        Args:
            trained: training images at each stage, ``(R, F)`` each.
            held_out: images that were not trained on, ``(M, F)`` each, M at least 2.

        Example:
            >>> trained = torch.eye(3)
            >>> held_out = torch.tensor([[1.0, 0.1, 0.0], [0.1, 0.0, 1.0], [0.2, 1.0, 0.0], [0.3, 0.0, 1.0]])
            >>> familiarity = Familiarity.measured([trained], [held_out])
            >>> familiarity([torch.tensor([[0.0, 2.0, 0.0], [-1.0, -1.0, -1.0]])])
            tensor([1.0000, 0.2000])
        """
        references = [_directions(stage) for stage in trained]
        return cls._relative_to(references, _distances(references, held_out))

    @classmethod
    def among(cls, images: Sequence[Tensor], together: Sequence[Hashable]) -> "Familiarity":
        """From images that the network was not trained on, some of them held out from the others in turn.

        Each is as far away as the nearest that it shares nothing with. (Leaving one out gives no guarantee, but is
        right in practice: Barber et al. 2021, https://arxiv.org/abs/1905.02928.)

        Args:
            images: at each stage, ``(R, F)`` each.
            together: what images share that are held out together, ``R``; two different values at least.

        Example:
            >>> images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [1.0, 0.2]])
            >>> familiarity = Familiarity.among([images], ["one", "one", "another", "third"])
            >>> familiarity([torch.tensor([[1.0, 0.1], [0.0, 1.0]])])
            tensor([1.0000, 0.2000])
        """
        references = [_directions(stage) for stage in images]
        number = {unit: place for place, unit in enumerate(dict.fromkeys(together))}
        unit = torch.tensor([number[unit] for unit in together], device=references[0].device)
        return cls._relative_to(references, _distances(references, references, unit[:, None] == unit))

    @classmethod
    def _relative_to(cls, references: Sequence[Tensor], distances: Tensor) -> "Familiarity":
        """To the distances of usual images from references, ``(stages, M)``."""
        centre = distances.mean(dim=1, keepdim=True)
        # Where all are equally far away, a distance would be divided by nothing.
        spread = distances.std(dim=1, keepdim=True).clamp_min(_LEAST_SPREAD)
        return cls(references, centre, spread, ((distances - centre) / spread).sum(dim=0))

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Of images at each stage, ``(N, F)`` each, float32 ``(N,)``."""
        strangeness = ((_distances(self.references, stages) - self.centre) / self.spread).sum(dim=0)
        as_strange = (self.usual >= strangeness.unsqueeze(1)).sum(dim=1)
        return (as_strange + 1) / (len(self.usual) + 1)

    @property
    def references(self) -> list[Tensor]:
        return [self.get_buffer(f"references_{number}") for number in range(self._stages)]

    @property
    def step(self) -> float:
        """The least difference between two values."""
        return 1 / (len(self.usual) + 1)

    def to_state(self) -> dict[str, Any]:
        """The arguments that make it anew, on the processor: for a checkpoint."""
        references = [stage.cpu() for stage in self.references]
        return {"references": references, **{name: getattr(self, name).cpu() for name in ("centre", "spread", "usual")}}


def _directions(stage: Tensor) -> Tensor:
    return functional.normalize(stage.float(), dim=1)


def _distances(references: Sequence[Tensor], stages: Sequence[Tensor], without: Tensor | None = None) -> Tensor:
    """From the nearest reference at each stage, ``(stages, N)``; ``without``: from which not, ``(N, R)``."""
    nearness = [_directions(stage) @ near.T for near, stage in zip(references, stages, strict=True)]
    if without is not None:
        nearness = [of_stage.masked_fill(without, -torch.inf) for of_stage in nearness]
    return torch.stack([1 - of_stage.amax(dim=1) for of_stage in nearness])
