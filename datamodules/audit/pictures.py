"""Small pictures that are written into a page."""

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.audit.inspection import Decode, as_rgb
from datamodules.storage import Storage

_QUALITY = 72


class Thumbnails:
    """Reads and shrinks images on demand, each once.

    Args:
        storage: where they lie.
        decode: how they are decoded.
        side: of the square that they are fitted into, in pixels.
    """

    def __init__(self, storage: Storage, decode: Decode, side: int) -> None:
        self._storage = storage
        self._decode = decode
        self._side = side
        self._made: dict[int, str | None] = {}

    def __call__(self, row: int) -> str | None:
        """The picture as an address that contains it (``data:image/jpeg;base64,...``); None where it cannot be read."""
        if row not in self._made:
            try:
                source = self._storage.source(row)
                pixels = self._decode(source)
            except OSError:
                self._made[row] = None
            else:
                self._made[row] = inline(as_rgb(pixels), self._side)
        return self._made[row]


def inline(pixels: NDArray[Any], side: int) -> str:
    """A picture, uint8 ``(H, W, 3)``, shrunk to fit a square, as an address that contains it.

    Example:
        >>> inline(np.zeros((2, 2, 3), np.uint8), 8)[:23]
        'data:image/jpeg;base64,'
    """
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((side, side), reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
