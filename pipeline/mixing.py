"""Mixup and CutMix: training on mixtures of two images of a batch."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["none", "mixup", "cutmix", "either"]

# Strengths of the papers' ImageNet experiments.
_ALPHAS = {"mixup": 0.2, "cutmix": 1.0}


@dataclass(frozen=True)
class Mixture:
    """Mixed images, and what is in them.

    Attributes:
        images: ``(N, C, H, W)``.
        partner: int64 ``(N,)``: the image that each was mixed with.
        share: of the image itself, in [0, 1]; the partner has the rest.
    """

    images: Tensor
    partner: Tensor
    share: float


def mix(
    images: Tensor, kind: Literal["mixup", "cutmix", "either"], alpha: float | None, key: tuple[int, ...]
) -> Mixture:
    """Mix every image of a batch with the one before it (training draws batches in random order).

    Mixup adds the two (Zhang et al. 2018, https://arxiv.org/abs/1710.09412), CutMix puts a rectangle of one into the
    other (Yun et al. 2019, https://arxiv.org/abs/1905.04899); ``either`` tosses a coin for each batch.

    Args:
        images: float ``(N, C, H, W)``; left as they are. One alone stays as it is.
        kind: which.
        alpha: of the Beta distribution of the share, finite and above 0; None: 0.2 for mixup, 1.0 for CutMix, as in
            the papers.
        key: what decides every draw, such as seed, epoch and batch.
    """
    rng = np.random.default_rng(key)
    if kind == "either":
        kind = "mixup" if rng.random() < 0.5 else "cutmix"
    strength = _ALPHAS[kind] if alpha is None else alpha
    share = float(rng.beta(strength, strength))
    partner = torch.arange(len(images), device=images.device).roll(1)
    if kind == "mixup":
        return Mixture(torch.lerp(images[partner], images, share), partner, share)
    height, width = images.shape[2:]
    side = np.sqrt(1 - share)
    middle = rng.random(2) * (height, width)
    top, left = np.rint(np.clip(middle - side * np.array((height, width)) / 2, 0, None)).astype(int)
    bottom, right = np.rint(np.clip(middle + side * np.array((height, width)) / 2, None, (height, width))).astype(int)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner][:, :, top:bottom, left:right]
    return Mixture(mixed, partner, 1 - float((bottom - top) * (right - left)) / (height * width))
