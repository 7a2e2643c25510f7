"""From an encoded image to pixels: the one decoder of training, evaluation and the served model.

Needs numpy and Pillow alone, because a registered model carries a copy of this file.
"""

import io
from os import PathLike

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

# 16-bit images keep their upper 8 bits.
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def decode(source: bytes | str | PathLike[str]) -> NDArray[np.uint8]:
    """Pixels of an encoded image (JPEG, PNG, BMP, TIFF, WebP ...).

    Grey and palette images become three channels, an alpha channel is dropped, 16-bit values keep their upper
    8 bits, and a rotation noted in EXIF is carried out.

    Args:
        source: the encoded bytes, or the path of a file.

    Returns:
        RGB, shape ``(height, width, 3)``, uint8, 0 to 255.

    Raises:
        OSError: the bytes are no image that Pillow can read, or are cut short.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("L", (4, 2), 128).save(buffer, "PNG")
        >>> decode(buffer.getvalue()).shape
        (2, 4, 3)
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in _SIXTEEN_BIT_MODES:
                upright = Image.fromarray((np.asarray(upright).astype(np.uint32) >> 8).astype(np.uint8))
            elif upright.mode in ("P", "PA"):
                upright = upright.convert("RGBA")  # by way of RGBA, a transparent palette entry keeps its colour
            return np.asarray(upright.convert("RGB"))
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's plugins raise these, too, for damaged files.
        raise OSError(str(error)) from error
