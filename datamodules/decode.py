"""From an encoded image to pixels: the one decoder of training, evaluation and the served model.

Needs numpy and Pillow alone, because a registered model carries a copy of this file. Where ``simplejpeg`` is installed
it decodes JPEGs, in half of Pillow's time and to the same bits, because both are the same library underneath;
``tifffile`` is needed for TIFF files that Pillow cannot hold (more than 8 bits or 4 channels).
"""

import io
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

#: What is read; other formats of Pillow start programs (EPS) or are no photographs. (MPO, of some cameras, is a JPEG.)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
#: Pixels of the largest image that is read, Pillow's own limit; a small file can claim to be larger than any memory.
MOST_PIXELS = 178_956_970

# 16-bit images keep their upper 8 bits where 8 are asked for.
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_EXIF_ORIENTATION = 0x0112
_REDUCTIONS = (8, 4, 2)  # what every JPEG decoder can leave out at no cost


class DecodedImage:
    """A picture that is an array already.

    Args:
        array: ``(H, W, C)``.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        self.height, self.width = array.shape[:2]

    def pixels(self, share: float = 1.0) -> NDArray[Any]:
        """All of it, whatever share is enough."""
        return self.array


class EncodedImage:
    """An image file of which the head has been read; of several frames, the first.

    Args:
        source: the encoded bytes, or the path of a file.
        channels: that the pixels must have. 3 and 1 of 8 bits are made from colour, grey and palette images alike (an
            alpha channel is dropped, 16-bit values keep their upper 8 bits); anything else must be so in the file.
        dtype: of the pixels: ``uint8``, ``uint16`` or ``float32``.

    Raises:
        OSError: these are no bytes of an image that can be read, or not of this kind; the text says why.
    """

    def __init__(self, source: bytes | str | PathLike[str], channels: int = 3, dtype: str = "uint8") -> None:
        self._data = source if isinstance(source, bytes) else Path(source).read_bytes()
        self.channels = channels
        self.dtype = dtype
        if not self._data:
            raise OSError("it is empty")
        self._array: NDArray[Any] | None = None
        self._orientation = 1
        if _is_array(self._data) or (self._data[:2] in (b"II", b"MM") and not self._fits_pillow):
            self._array = _read_array(self._data, channels, dtype)
            self.height, self.width = self._array.shape[:2]
            return
        try:
            self._image = Image.open(io.BytesIO(self._data), formats=FORMATS)
            self._orientation = int(self._image.getexif().get(_EXIF_ORIENTATION, 1))
        except UnidentifiedImageError as error:
            page = self._data[:256].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))
            raise OSError("it is a web page" if page else "it is no image") from error
        except _DAMAGES as error:
            raise OSError(str(error)) from error
        width, height = self._image.size
        if width * height == 0:
            raise OSError(f"it has {width} x {height} pixels")
        self.height, self.width = (width, height) if self._orientation >= 5 else (height, width)

    @property
    def _fits_pillow(self) -> bool:
        return self.dtype == "uint8" and self.channels in _MODES

    def pixels(self, share: float = 1.0) -> NDArray[Any]:
        """The image, upright as its EXIF data says.

        A JPEG is decoded at an eighth, a quarter or half of its size where that is enough: the decoder then leaves out
        most of the work.

        Args:
            share: the smallest scale that is enough, in (0, 1].

        Returns:
            ``(H, W, C)`` of ``dtype``.

        Raises:
            OSError: the data is damaged, cut short, or of another kind.
        """
        if self._array is not None:
            return self._array
        reduction = next((n for n in _REDUCTIONS if n * share <= 1), 1)
        try:
            pixels = self._fast_jpeg(reduction)
            if pixels is None:
                pixels = self._by_pillow(reduction)
        except _DAMAGES as error:
            raise OSError(str(error)) from error
        return np.ascontiguousarray(_upright(pixels, self._orientation))

    def _fast_jpeg(self, reduction: int) -> NDArray[np.uint8] | None:
        image = self._image
        same = image.mode == "RGB" or image.mode == "L"
        if simplejpeg is None or image.format not in ("JPEG", "MPO") or not same or self.dtype != "uint8":
            return None
        if self.channels != 3 and (self.channels, image.mode) != (1, "L"):
            return None
        width, height = image.size
        try:
            return simplejpeg.decode_jpeg(
                self._data,
                colorspace="RGB" if self.channels == 3 else "GRAY",
                min_width=-(-width // reduction),
                min_height=-(-height // reduction),
                min_factor=reduction,
            )
        except ValueError:
            return None  # damaged or unusual: Pillow decides, and gives the reason

    def _by_pillow(self, reduction: int) -> NDArray[Any]:
        image: Image.Image = self._image
        if reduction > 1:
            width, height = image.size
            self._image.draft(None, (width // reduction, height // reduction))  # heeded by JPEGs alone
        image.load()
        if self.dtype == "uint16":
            _require_kind(self.channels == 1 and image.mode in _SIXTEEN_BIT_MODES, self, image.mode)
            return np.asarray(image).astype(np.uint16)[..., None]
        _require_kind(self.dtype == "uint8" and self.channels in _MODES, self, image.mode)
        if image.mode in _SIXTEEN_BIT_MODES:
            image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
        elif image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # by way of RGBA, a transparent palette entry keeps its colour
        _require_kind(self.channels < 4 or image.mode == "RGBA", self, image.mode)
        pixels = np.asarray(image.convert(_MODES[self.channels]))
        return pixels if pixels.ndim == 3 else pixels[..., None]


# What Pillow's plugins raise for damaged files, beside OSError.
_DAMAGES = (SyntaxError, ValueError, IndexError, KeyError, TypeError, OverflowError, Image.DecompressionBombError)


def decode(source: bytes | str | PathLike[str], channels: int = 3, dtype: str = "uint8") -> NDArray[Any]:
    """Pixels of an encoded image (JPEG, PNG, BMP, GIF, TIFF, WebP, NPY) at full size.

    Args:
        source: the encoded bytes, or the path of a file.
        channels: see :class:`EncodedImage`.
        dtype: see :class:`EncodedImage`.

    Returns:
        ``(height, width, channels)``; by default RGB, uint8, 0 to 255.

    Raises:
        OSError: the bytes are no image that can be read, or are cut short.

    Example:
        >>> buffer = io.BytesIO()
        >>> Image.new("L", (4, 2), 128).save(buffer, "PNG")
        >>> decode(buffer.getvalue()).shape
        (2, 4, 3)
    """
    return EncodedImage(source, channels, dtype).pixels()


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo a rotation noted in EXIF (orientations 2 to 8)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _require_kind(fits: bool, wanted: EncodedImage, found: str) -> None:
    if not fits:
        raise OSError(f"expected {wanted.channels} channels of {wanted.dtype}, found an image of kind {found}")


# Arrays: NPY, and the TIFF files of microscopes and satellites


def _is_array(data: bytes) -> bool:
    return data.startswith(b"\x93NUMPY")


def _read_array(data: bytes, channels: int, dtype: str) -> NDArray[Any]:
    try:
        array = _read_npy(data) if _is_array(data) else _read_tiff(data)
    except OSError:
        raise
    except Exception as error:  # the readers raise many types for damaged files
        raise OSError(f"it is damaged ({type(error).__name__}: {error})") from error
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[2] != channels and array.shape[0] == channels:
        array = np.moveaxis(array, 0, 2)  # channels first, as geographic tools write them
    kind = array.dtype.newbyteorder("=")
    if dtype == "float32" and kind.kind == "f":
        kind = np.dtype(np.float32)
    if array.ndim != 3 or array.shape[2] != channels or kind != np.dtype(dtype):
        raise OSError(f"expected (H, W, {channels}) of {dtype}, found {tuple(array.shape)} of {array.dtype.name}")
    if 0 in array.shape:
        raise OSError(f"it has {array.shape[1]} x {array.shape[0]} pixels")
    array = np.ascontiguousarray(array, kind)
    if kind.kind == "f" and not np.isfinite(array).all():
        raise OSError("it holds values that are not finite")
    return array


def _read_npy(data: bytes) -> NDArray[Any]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    if np.prod(shape, dtype=np.float64) * kind.itemsize > len(data):
        raise OSError("it is truncated")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _read_tiff(data: bytes) -> NDArray[Any]:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first = file.series[0]
        if np.prod(first.shape, dtype=np.float64) > MOST_PIXELS * 4:
            raise OSError(f"it claims to hold {tuple(first.shape)} values, more than any image that is read here")
        return first.asarray()
