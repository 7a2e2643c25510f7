"""The random crop with which training reads an image: drawn before decoding, so that no more is decoded than needed."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.preprocessing import Picture
from datamodules.resizing import resize


@dataclass(frozen=True)
class RandomResizedCrop:
    """A part of random area, shape and place, resized to a fixed size.

    Szegedy et al. 2015 (https://arxiv.org/abs/1409.4842, section 6).

    Attributes:
        height: of the result, in pixels.
        width: of the result, in pixels.
        scale: bounds of the area's share.
        ratio: bounds of width to height.
    """

    height: int
    width: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @property
    def smallest_share(self) -> float:
        """Of a square image's side, what the short side of the smallest crop keeps."""
        return math.sqrt(self.scale[0] * min(self.ratio[0], 1 / self.ratio[1]))

    def __call__(self, picture: Picture, rng: np.random.Generator) -> NDArray[Any]:
        """Draw a crop and cut it out.

        Args:
            picture: where from.
            rng: what is drawn depends on it and on the picture's shape alone.

        Returns:
            ``(height, width, C)`` of the picture's dtype.
        """
        top, left, height, width = self._draw(picture.height, picture.width, rng)
        # A crop that is decoded too small would be enlarged afterwards: never less than it is shrunk to.
        share = max(self.height / height, self.width / width)
        image = picture.pixels(min(1.0, share))
        y_scale, x_scale = image.shape[0] / picture.height, image.shape[1] / picture.width
        rows = slice(math.floor(top * y_scale), math.ceil((top + height) * y_scale))
        columns = slice(math.floor(left * x_scale), math.ceil((left + width) * x_scale))
        crop = image[rows, columns]
        if not image.flags.writeable:
            # From a memory map: a copy fetches it in order, in half the time of a resampling that does so row by row.
            crop = np.ascontiguousarray(crop)
        return resize(crop, self.height, self.width)

    def _draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
        """Top, left, height and width of a crop, in pixels, not rounded."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area, shape, y, x = rng.random(4)
            area = height * width * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            shape = math.exp(low + shape * (high - low))
            crop_height, crop_width = math.sqrt(area / shape), math.sqrt(area * shape)
            if crop_height <= height and crop_width <= width:
                return y * (height - crop_height), x * (width - crop_width), crop_height, crop_width
        # A very long or high image has no such crop: the largest central one of an allowed shape.
        crop_height = min(height, width / self.ratio[0])
        crop_width = min(width, height * self.ratio[1])
        return (height - crop_height) / 2, (width - crop_width) / 2, crop_height, crop_width
