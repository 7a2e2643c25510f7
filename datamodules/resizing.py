"""Fast resizing of images with any number of channels, for training."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_MOST = 4  # channels that OpenCV resizes at once


def resize(image: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Bilinear, or by areas where an image shrinks by two or more and bilinear would leave pixels out.

    Args:
        image: ``(H, W, C)``, uint8, uint16 or float32.
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        ``(height, width, C)`` of the same dtype.
    """
    shrinks_by = min(image.shape[0] / height, image.shape[1] / width)
    how = cv2.INTER_AREA if shrinks_by >= 2 else cv2.INTER_LINEAR
    if image.shape[2] <= _MOST:
        resized = cv2.resize(image, (width, height), interpolation=how)
        return resized if resized.ndim == 3 else resized[..., None]
    starts = range(0, image.shape[2], _MOST)
    parts = [np.ascontiguousarray(image[..., start : start + _MOST]) for start in starts]
    return np.concatenate([resize(part, height, width) for part in parts], axis=2)
