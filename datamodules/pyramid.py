"""An image at full, half and quarter scale in one array, so that a large part of it is read as fast as a small one."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.resizing import resize

_LEVELS = 3
_SMALLEST = 2**_LEVELS  # pixels of a side from which on three levels fit beside one another


def build_pyramid(image: NDArray[Any], short_side: int | None) -> NDArray[Any]:
    """Shrink an image and put its smaller scales at its right (the mip map of Williams 1983, for reading crops).

    Args:
        image: ``(H, W, C)``.
        short_side: in pixels, that the largest scale has at most; None: as it is.

    Returns:
        ``(h, w + ceil(w / 2), C)`` of the same dtype.
    """
    height, width = image.shape[:2]
    if short_side is not None and min(height, width) > short_side:
        scale = short_side / min(height, width)
        image = resize(image, round(height * scale), round(width * scale))
    height, width = image.shape[:2]
    packed = np.zeros((height, width + -(-width // 2), image.shape[2]), image.dtype)
    packed[:, :width] = image
    for level, (top, left, level_height, level_width) in enumerate(_places(height, width)):
        if level > 0:
            image = resize(image, level_height, level_width)
            packed[top : top + level_height, left : left + level_width] = image
    return packed


class PyramidImage:
    """A picture read from what :func:`build_pyramid` made.

    Args:
        packed: the array; only the parts that are asked for are touched.
    """

    def __init__(self, packed: NDArray[Any]) -> None:
        self._packed = packed
        self.height = packed.shape[0]
        self.width = packed.shape[1] * 2 // 3

    def pixels(self, share: float = 1.0) -> NDArray[Any]:
        """The whole image at the smallest kept scale of at least ``share``."""
        places = _places(self.height, self.width)
        level = max(level for level in range(len(places)) if level == 0 or 2**level * share <= 1)
        top, left, height, width = places[level]
        return self._packed[top : top + height, left : left + width]


def _places(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of every scale, the largest first."""
    places = [(0, 0, height, width)]
    if min(height, width) >= _SMALLEST:
        top = 0
        for level in range(1, _LEVELS):
            size = -(-height // 2**level), -(-width // 2**level)
            places.append((top, width, *size))
            top += size[0]
    return places
