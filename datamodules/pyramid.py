"""An image at full, half and quarter scale in one array, so that a large part of it is read as fast as a small one."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.resizing import resize

_LEVELS = 3
_SMALLEST = 2**_LEVELS  # pixels of a side from which on three levels fit beside one another
_DIGITS = 8  # values that hold the size of the image as it was: two numbers of four bytes


def build_pyramid(image: NDArray[Any], short_side: int | None, size: tuple[int, int] | None = None) -> NDArray[Any]:
    """Shrink an image and put its smaller scales at its right (the mip map of Williams 1983, for reading crops).

    Args:
        image: ``(H, W, C)``.
        short_side: in pixels, that the largest scale has at most; None: as it is.
        size: height and width of the image that this one is a smaller scale of; None: it is not. What is drawn for a
            crop depends on it, and must not depend on what is kept.

    Returns:
        ``(h, w + ceil(w / 2), C)`` of the same dtype, and below it a row with the size.
    """
    size = image.shape[:2] if size is None else size
    height, width = image.shape[:2]
    if short_side is not None and min(height, width) > short_side:
        scale = short_side / min(height, width)
        image = resize(image, round(height * scale), round(width * scale))
    height, width = image.shape[:2]
    columns = width + -(-width // 2)
    packed = np.zeros((height + _rows_of_size(columns, image.shape[2]), columns, image.shape[2]), image.dtype)
    packed[:height, :width] = image
    packed[height:].reshape(-1)[:_DIGITS] = np.array(size, "<u4").view(np.uint8)
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
        rows, columns, channels = packed.shape
        height = rows - _rows_of_size(columns, channels)
        self._places = _places(height, columns * 2 // 3)
        digits = packed[height:].reshape(-1)[:_DIGITS].astype(np.uint8)
        self.height, self.width = digits.view("<u4").tolist()

    def pixels(self, share: float = 1.0) -> NDArray[Any]:
        """The whole image at the smallest kept scale of at least ``share``, or else at the largest."""
        height, width = share * self.height, share * self.width
        enough = [place for place in self._places if place[2] >= height and place[3] >= width]
        top, left, height, width = enough[-1] if enough else self._places[0]
        return self._packed[top : top + height, left : left + width]


def _rows_of_size(columns: int, channels: int) -> int:
    return -(-_DIGITS // (columns * channels))


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
