"""Augmentation of training images: presets by name, or any list of albumentations transforms.

A transform here works on decoded pixels (uint8, RGB); scaling to [0, 1], normalising and making tensors is the
model's own work and is refused.
"""

from collections.abc import Sequence
from typing import TypeAlias

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.errors import DataError

Transform: TypeAlias = A.BasicTransform | A.BaseCompose


def _light(size: int) -> list[Transform]:
    return [_random_resized_crop(size, smallest=0.5), A.HorizontalFlip(p=0.5)]


def _standard(size: int) -> list[Transform]:
    return [
        _random_resized_crop(size, smallest=0.25),
        A.HorizontalFlip(p=0.5),
        A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.02, 0.02), p=0.8),
    ]


def _strong(size: int) -> list[Transform]:
    return [
        _random_resized_crop(size, smallest=0.1),
        A.HorizontalFlip(p=0.5),
        A.Affine(rotate=(-15, 15), shear=(-10, 10), border_mode=cv2.BORDER_REFLECT_101, p=0.5),
        A.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.05, 0.05), p=0.8),
        A.GaussianBlur(blur_limit=(3, 5), p=0.1),
        A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(0.1, 0.3), hole_width_range=(0.1, 0.3), p=0.25),
    ]


def _random_resized_crop(size: int, smallest: float) -> Transform:
    # Averaging over areas when shrinking: plain interpolation would alias where evaluation does not.
    return A.RandomResizedCrop(size=(size, size), scale=(smallest, 1.0), area_for_downscale="image")


#: Name to a function of the image size in pixels.
PRESETS = {"light": _light, "standard": _standard, "strong": _strong}

# What the task does on the device, from the weights' own record.
_FORBIDDEN = {"Normalize", "ToFloat", "FromFloat", "ToTensorV2", "ToTensor3D"}


def build_augmentation(transforms: str | Sequence[Transform], size: int) -> A.Compose:
    """A pipeline from a preset's name or from transforms in order.

    Args:
        transforms: ``light``, ``standard``, ``strong``, or albumentations transforms.
        size: side of the network's input, in pixels; presets crop to it.

    Raises:
        DataError: an unknown preset, or a transform that normalises or makes tensors.
    """
    if isinstance(transforms, str):
        if transforms not in PRESETS:
            raise DataError(
                f"data.train_transforms: expected {', '.join(PRESETS)} or a list of albumentations transforms, "
                f"found '{transforms}'; name a preset or write the list out."
            )
        return A.Compose(PRESETS[transforms](size))
    compose = A.Compose(list(transforms))
    for name in _names(compose):
        if name in _FORBIDDEN:
            raise DataError(
                f"data.train_transforms: expected transforms of uint8 pixels, found {name}; remove it: the model "
                "scales and normalises its input itself, as its weights ask for."
            )
    return compose


def _names(compose: A.BaseCompose) -> list[str]:
    names = []
    for transform in compose.transforms:
        names += _names(transform) if isinstance(transform, A.BaseCompose) else [type(transform).__name__]
    return names


def augment(compose: A.Compose, image: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """One augmented image ``(height, width, 3)``, uint8; ``seed`` alone decides how it comes out."""
    compose.set_random_seed(seed)
    return compose(image=image)["image"]
