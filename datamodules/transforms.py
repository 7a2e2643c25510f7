"""Augmentation of training images: presets by name, or any list of albumentations transforms.

A transform here works on decoded pixels; scaling to [0, 1], normalising and making tensors is the model's own work and
is refused.
"""

import math
import random
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.cropping import RandomResizedCrop
from datamodules.errors import DataError
from datamodules.preprocessing import Picture, Preprocessing
from datamodules.resizing import resize

Transform: TypeAlias = A.BasicTransform | A.BaseCompose


class TrivialAugment(A.ImageOnlyTransform):
    """One operation of torchvision's TrivialAugmentWide, drawn at random, at a random strength; RGB, uint8.

    Müller and Hutter 2021 (https://arxiv.org/abs/2103.10158).

    Args:
        p: probability of being applied.
    """

    def __init__(self, p: float = 1.0) -> None:
        super().__init__(p=p)
        from torchvision.transforms import v2

        self._transform = v2.TrivialAugmentWide()

    def get_params(self) -> dict[str, Any]:
        return {"seed": self.py_random.getrandbits(32)}

    def apply(self, img: NDArray[Any], seed: int = 0, **_: Any) -> NDArray[Any]:
        # torchvision draws from torch's global generator; nobody else must notice.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            out = self._transform(torch.from_numpy(np.ascontiguousarray(img.transpose(2, 0, 1))))
        return np.ascontiguousarray(out.numpy().transpose(1, 2, 0))


Orientation = Literal["upright", "mirrored", "flipped", "any"]
#: What a picture may be turned into and still show the same: nothing else; its mirror image; that and both of them
#: upside down; or any of the eight pictures that quarter turns and mirrors make of a square.
ORIENTATIONS: dict[Orientation, Callable[[], list[Transform]]] = {
    "upright": list,
    "mirrored": lambda: [A.HorizontalFlip(p=0.5)],
    "flipped": lambda: [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)],
    "any": lambda: [A.D4(p=1.0)],
}


# Quarter turns, each of them with and without a mirror, that make an orientation's pictures.
_QUARTERS: dict[Orientation, Sequence[int]] = {"upright": (), "mirrored": (0,), "flipped": (0, 2), "any": range(4)}


def turns(orientation: Orientation) -> dict[str, Callable[[Tensor], Tensor]]:
    """What a picture may be turned into, but itself: by name, functions of square pictures ``(N, C, H, W)``.

    Example:
        >>> list(turns("mirrored"))
        ['mirrored']
        >>> turns("flipped")["mirrored, turned by 180"](torch.arange(4).view(1, 1, 2, 2)).tolist()  # upside down
        [[[[2, 3], [0, 1]]]]
    """
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for quarters in _QUARTERS[orientation]:
        turn = f"turned by {90 * quarters}"
        if quarters:
            found[turn] = partial(torch.rot90, k=quarters, dims=(2, 3))
        found[f"mirrored, {turn}" if quarters else "mirrored"] = partial(_mirrored, quarters=quarters)
    return found


def _mirrored(images: Tensor, quarters: int) -> Tensor:
    return torch.rot90(images.flip(3), quarters, (2, 3))


def _standard() -> list[Transform]:
    return [
        A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.02, 0.02), p=0.8),
    ]


def _strong() -> list[Transform]:
    return [
        A.Affine(rotate=(-15, 15), shear=(-10, 10), border_mode=cv2.BORDER_REFLECT_101, p=0.5),
        A.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.05, 0.05), p=0.8),
        A.GaussianBlur(blur_limit=(3, 5), p=0.1),
        A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(0.1, 0.3), hole_width_range=(0.1, 0.3), p=0.25),
    ]


#: Name to the smallest crop's share of the area, and what follows the crop and the turn.
PRESETS: dict[str, tuple[float, Callable[[], list[Transform]]]] = {
    "light": (0.5, list),
    "standard": (0.25, _standard),
    "strong": (0.1, _strong),
    "trivial_augment": (0.25, lambda: [TrivialAugment()]),
}

# What the task does on the device, from the weights' own record.
_FORBIDDEN = {"Normalize", "ToFloat", "FromFloat", "ToTensorV2", "ToTensor3D"}
# What knows three colours of 8 bits only; presets for other images do without.
_COLOURS = (A.ColorJitter, TrivialAugment)


class Augmentation:
    """How a training image is cut out and changed, from its seed alone.

    A random resized crop in front is carried out while the image is read, by :class:`RandomResizedCrop`, because it
    says how much has to be decoded; everything after it runs as albumentations has it, with floats outside [0, 1]
    brought there by the crop's own least and greatest value, and back.

    Args:
        transforms: ``light``, ``standard``, ``strong``, ``trivial_augment``, or albumentations transforms in order.
        preprocessing: of the network.
        size: of the images that come out, in pixels; presets crop to it, and what comes out in another size is fitted
            to it; none: that of the preprocessing.
        orientation: how presets turn images (see :data:`ORIENTATIONS`).
        smallest_crop: least share of an image's area that presets crop to, in (0, 1]; none: each has its own.
        reduced_epochs: so many first epochs have smaller images (see :func:`reduced_size`).

    Raises:
        DataError: an unknown preset, no share of the area, or a transform that normalises, makes tensors or takes no
            such images.
    """

    def __init__(
        self,
        transforms: str | Sequence[Transform],
        preprocessing: Preprocessing,
        size: int | None = None,
        orientation: Orientation = "mirrored",
        smallest_crop: float | None = None,
        reduced_epochs: int = 0,
    ) -> None:
        if smallest_crop is not None and not 0 < smallest_crop <= 1:
            raise DataError(
                f"data.smallest_crop: expected a share of the area above 0 and up to 1, found {smallest_crop}."
            )
        preprocessing = preprocessing if size is None else replace(preprocessing, size=size)
        self.preprocessing = preprocessing
        #: The crop in front, or None.
        self.crop: RandomResizedCrop | None = None
        rgb = (preprocessing.channels, preprocessing.dtype) == (3, "uint8")
        if isinstance(transforms, str):
            if transforms not in PRESETS:
                raise DataError(
                    f"data.train_transforms: expected {', '.join(PRESETS)} or a list of albumentations transforms, "
                    f"found '{transforms}'; name a preset or write the list out."
                )
            usual, others = PRESETS[transforms]
            smallest = usual if smallest_crop is None else smallest_crop
            self.crop = RandomResizedCrop(preprocessing.size, preprocessing.size, (smallest, 1.0))
            wanted = [*ORIENTATIONS[orientation](), *others()]
            rest = [transform for transform in wanted if rgb or not isinstance(transform, _COLOURS)]
        else:
            rest = list(transforms)
            if rest and (crop := _leading_crop(rest[0])) is not None:
                self.crop, rest = crop, rest[1:]
        self.compose = A.Compose(rest)
        for name in _names(self.compose):
            if name in _FORBIDDEN:
                raise DataError(
                    f"data.train_transforms: expected transforms of {preprocessing.dtype} pixels, found {name}; remove "
                    "it: the model scales and normalises its input itself, as its weights ask for."
                )
            if name == TrivialAugment.__name__ and not rgb:
                raise DataError(
                    f"data.train_transforms: expected transforms of {preprocessing.channels} channels of "
                    f"{preprocessing.dtype}, found {name}, which knows 3 of uint8 alone; use light or standard."
                )
        self._side, self._reduced_epochs = preprocessing.size, reduced_epochs
        self._reduced = copy(self)
        self._reduced._side = side = reduced_size(preprocessing.size)
        # A list may count on the size that its crop makes; its images shrink when it is through.
        if isinstance(transforms, str) and self.crop is not None:
            self._reduced.crop = replace(self.crop, height=side, width=side)
            self._reduced.preprocessing = replace(preprocessing, size=side)

    def at(self, epoch: int) -> "Augmentation":
        """The augmentation of an epoch: the same things happen in all of them, to smaller images in the first ones."""
        return self._reduced if epoch < self._reduced_epochs else self

    @property
    def short_side(self) -> int | None:
        """Short side in pixels from which on no crop is enlarged; None: without a crop in front, all may matter."""
        if self.crop is None:
            return None
        return math.ceil(max(self.crop.height, self.crop.width) / min(1.0, self.crop.smallest_share))

    def __call__(self, picture: Picture, seed: np.random.SeedSequence) -> NDArray[Any]:
        """One augmented image ``(size, size, C)`` of the picture's dtype; ``seed`` alone decides how it comes out.

        What :meth:`at` gave for an epoch of smaller images makes smaller ones.
        """
        image = self.crop(picture, np.random.default_rng(seed)) if self.crop is not None else picture.pixels()
        if self.compose.transforms:
            # One stream for all of them: `set_random_seed` would seed each alike, and two that are applied by chance
            # would always be applied together.
            number = int(seed.generate_state(1)[0])
            self.compose.set_random_state(np.random.default_rng(number), random.Random(number))
            image = self._transformed(image)
        channels, dtype = self.preprocessing.channels, self.preprocessing.dtype
        if image.dtype != dtype or image.ndim != 3 or image.shape[2] != channels:
            raise TypeError(f"expected (H, W, {channels}) of {dtype}, found {image.shape} of {image.dtype}")
        if image.shape[:2] != (self.preprocessing.size,) * 2:
            image = self.preprocessing.fit_to_size(image)
        return image if self._side == self.preprocessing.size else resize(image, self._side, self._side)

    def _transformed(self, image: NDArray[Any]) -> NDArray[Any]:
        """Through the list of transforms, which take floats to lie in [0, 1] and cut off what does not."""
        low, high = (image.min(), image.max()) if image.dtype == np.float32 else (0, 0)
        if (low >= 0 and high <= 1) or low == high:
            return self.compose(image=image)["image"]
        image = self.compose(image=(image - low) / (high - low))["image"]
        return image * (high - low) + low if image.dtype == np.float32 else image


def reduced_size(size: int) -> int:
    """Side of the smaller images with which training begins: four fifths, as a multiple of 32 px, and at least 32.

    Example:
        >>> reduced_size(160), reduced_size(224)
        (128, 192)
    """
    return max(32, round(0.8 * size / 32) * 32)


def _leading_crop(transform: Transform) -> RandomResizedCrop | None:
    """Our crop in place of albumentations', where it is the plain one that is always applied."""
    if type(transform) is not A.RandomResizedCrop or transform.p < 1 or transform.interpolation != cv2.INTER_LINEAR:
        return None
    height, width = transform.size
    return RandomResizedCrop(height, width, tuple(transform.scale), tuple(transform.ratio))


def _names(compose: A.BaseCompose) -> list[str]:
    names = []
    for transform in compose.transforms:
        names += _names(transform) if isinstance(transform, A.BaseCompose) else [type(transform).__name__]
    return names
