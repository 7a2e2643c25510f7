"""From an encoded image to pixels: the one decoder of training, evaluation and the served model.

Needs numpy and Pillow alone, because a registered model carries a copy of this file. Where ``simplejpeg`` is installed
it decodes JPEGs, in half of Pillow's time and to the same bits, because both are the same library underneath;
``tifffile`` is needed for TIFF files of other kinds than grey and RGB of 8 bits.

Files are not trusted: what they claim is looked at before memory is taken for it, and nothing in them is run.
"""

import io
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

#: What is read; other formats of Pillow start programs (EPS) or are no photographs. (MPO, of some cameras, is a JPEG.)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")
#: Pixels of the largest image that is read, Pillow's own limit; a small file can claim to be larger than any memory.
MOST_PIXELS = 178_956_970
#: Bytes of the largest file and of the largest array that are read.
MOST_BYTES = 2**30

# 16-bit images keep their upper 8 bits where 8 are asked for.
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_EXIF_ORIENTATION = 0x0112
_NPY = b"\x93NUMPY"
_REDUCTIONS = (8, 4, 2)  # what every JPEG decoder can leave out at no cost
# A progressive JPEG has ten scans or some more; each costs a pass over the whole image, and a few bytes.
_MOST_SCANS = 100
_LEAST_JPEG = 1 / 1024  # bytes a pixel; a flat picture takes a bit for each 8 x 8 of them, twice as much
_TIFF_SAMPLES, _TIFF_PLANAR, _TIFF_TILE = 277, 284, (322, 323)
_LARGEST_TILE = 2**24  # pixels, where the image has fewer
_MOST_PAGES = 1000  # of a TIFF that are looked at


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
        self._data = source if isinstance(source, bytes) else read_file(Path(source))
        self.channels = channels
        self.dtype = dtype
        if not self._data:
            raise OSError("it is empty")
        self._array: NDArray[Any] | None = None
        self._orientation = 1
        if self._data.startswith(_NPY) or (self._data[:2] in (b"II", b"MM") and not self._is_photograph):
            self._array = _read_array(self._data, channels, dtype)
            self.height, self.width = self._array.shape[:2]
            return
        image = self._open()
        self._image: Image.Image | None = image
        self._format, self._mode = image.format, image.mode
        self._orientation = _orientation(image)
        self._stored = width, height = image.size
        if not 0 < width * height <= MOST_PIXELS:
            raise OSError(f"it has {width} x {height} pixels")
        if self._format in ("JPEG", "MPO"):
            _require_readable_jpeg(self._data, width * height)
        self.height, self.width = (width, height) if self._orientation >= 5 else (height, width)

    def _open(self) -> Image.Image:
        with _explaining():
            try:
                return Image.open(io.BytesIO(self._data), formats=FORMATS)
            except UnidentifiedImageError as error:
                raise OSError(_what_it_is(self._data)) from error
            except Image.DecompressionBombError as error:
                raise OSError(f"it claims more than {MOST_PIXELS:,} pixels") from error

    @property
    def _is_photograph(self) -> bool:
        return self.dtype == "uint8" and self.channels in (1, 3)

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
        # Pillow leaves alone what would have no pixel left.
        reduction = next((n for n in _REDUCTIONS if n * share <= 1 and n <= min(self._stored)), 1)
        with _explaining():
            pixels = self._fast_jpeg(reduction)
            if pixels is None:
                pixels = self._by_pillow(reduction)
        return np.ascontiguousarray(_upright(pixels, self._orientation))

    def _fast_jpeg(self, reduction: int) -> NDArray[np.uint8] | None:
        fits = self.dtype == "uint8" and (self._mode, self.channels) in (("RGB", 3), ("L", 3), ("L", 1))
        if simplejpeg is None or self._format not in ("JPEG", "MPO") or not fits:
            return None
        width, height = self._stored
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
        # Once it is read an image stays at its scale, so that another call needs another.
        image, self._image = self._open() if self._image is None else self._image, None
        self._require_kind(image)
        if reduction > 1:
            width, height = image.size
            image.draft(None, (width // reduction, height // reduction))  # heeded by JPEGs alone
        image.load()
        if image.mode in _SIXTEEN_BIT_MODES:
            values = np.asarray(image)
            if image.mode == "I" and not 0 <= values.min() <= values.max() < 2**16:
                raise OSError("it has values of 32 bits")
            if self.dtype == "uint16":
                return values.astype(np.uint16)[..., None]
            image = Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
        elif image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # by way of RGBA, a transparent palette entry keeps its colour
        pixels = np.asarray(image.convert(_MODES[self.channels]))
        return pixels if pixels.ndim == 3 else pixels[..., None]

    def _require_kind(self, image: Image.Image) -> None:
        """Refuse, before it is read, an image that would not keep its values."""
        mode = image.mode
        if self.dtype == "uint16":
            fits = self.channels == 1 and mode in _SIXTEEN_BIT_MODES
        else:
            # Values of floats may lie anywhere; opacity cannot be made up.
            fits = self.dtype == "uint8" and self.channels in _MODES and mode != "F"
            fits = fits and (self.channels < 4 or mode in ("RGBA", "P", "PA"))
        if not fits:
            raise OSError(f"expected {self.channels} channels of {self.dtype}, found an image of kind {mode}")
        if isinstance(image, TiffImageFile):
            planes, bands = image.tag_v2.get(_TIFF_SAMPLES, 1), len(image.getbands())
            if image.tag_v2.get(_TIFF_PLANAR) == 2 and planes != bands:
                # Pillow would read the first of planes that are not marked as colours.
                raise OSError(f"expected {self.channels} channels, found {planes} planes not marked as colours")
            width, height = (image.tag_v2.get(tag, 0) for tag in _TIFF_TILE)
            _require_tiles(width, height, image.size)


@contextmanager
def _explaining() -> Iterator[None]:
    """Whatever a reader raises as an ``OSError`` that says what is wrong."""
    try:
        yield
    except OSError:
        raise
    except MemoryError as error:
        raise OSError("it does not fit into memory") from error
    except Exception as error:  # the readers raise many types for damaged files
        raise OSError(f"it is damaged ({type(error).__name__}: {error})") from error


def read_file(path: Path) -> bytes:
    """The bytes of a file, of which it is not known what it is.

    Raises:
        OSError: there is none, it is a device or a pipe, or it is larger than any image.
    """
    try:
        found = path.stat()
    except ValueError as error:  # what no file can be called
        raise OSError(str(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no regular file")  # a pipe would never answer, a device never end
    if found.st_size > MOST_BYTES:
        raise OSError(f"it has {found.st_size:,} bytes, more than any image that is read here")
    return path.read_bytes()


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


def _orientation(image: Image.Image) -> int:
    """How an image is to be turned, 1 (not at all) to 8."""
    if isinstance(image, TiffImageFile):
        return 1  # Pillow turns it
    try:
        found = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged EXIF data raises many types, and says nothing of the pixels
        return 1
    return next((known for known in range(2, 9) if found == known), 1)


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo a rotation noted in EXIF (orientations 2 to 8)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # of a JPEG, without those that stand within a scan


def _require_readable_jpeg(data: bytes, pixels: int) -> None:
    """Refuse what decoders would read for long, and fill with grey."""
    if len(data) < _LEAST_JPEG * pixels:
        raise OSError("it is truncated")
    if _has_too_many_scans(data):
        raise OSError(f"it is a JPEG of more than {_MOST_SCANS} scans, which would take very long to read")


def _has_too_many_scans(data: bytes) -> bool:
    place, scans, components, progressive = 2, 0, b"", False
    while marker := _MARKER.search(data, place):
        kind, start = marker[1][0], marker.end()
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # the frame
            components, progressive = data[start + 7 : start + 8], kind % 4 == 2
        elif kind == 0xDA:
            scans += 1
            if scans > _MOST_SCANS:
                return True
            if not progressive and data[start + 2 : start + 3] == components:
                return False  # all there is to read
        elif kind == 0xD9:
            return False
        place = start + int.from_bytes(data[start : start + 2], "big")
    return False


# How files begin that people take for images.
_BEGINNINGS = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_OTHERS = {
    (0, b"%PDF"): "a PDF document",
    (0, b"%!PS"): "a PostScript document",
    (0, b"\0\0\1\0"): "an icon",
    (0, b"PK\3\4"): "a ZIP archive",
    (0, b"\0\5\x16\7"): "a companion file of macOS",
    (4, b"ftypavif"): "an AVIF image",
    (4, b"ftyp"): "a HEIC image or a film",
}


def _what_it_is(data: bytes) -> str:
    """What is known of data that Pillow does not."""
    for beginning, name in _BEGINNINGS.items():
        if data.startswith(beginning):
            return f"it is a {name} that is damaged or of a kind that is not read"
    for (place, beginning), name in _OTHERS.items():
        if data.startswith(beginning, place):
            return f"it is {name}; convert it to PNG or JPEG"
    text = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer in place of the image; run git lfs pull"
    if b"<svg" in text:
        return "it is an SVG drawing; convert it to PNG"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page"
    if text.startswith(b"{"):
        return "it is text, as a failed download leaves behind"
    return "it is no image" if any(data[:4096]) else "it begins with zeros alone, as a failed copy leaves behind"


# Arrays: NPY, and the TIFF files of microscopes and satellites


def _read_array(data: bytes, channels: int, dtype: str) -> NDArray[Any]:
    with _explaining():
        array = _read_npy(data, channels, dtype) if data.startswith(_NPY) else _read_tiff(data, channels, dtype)
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] != channels:
        array = np.moveaxis(array, 0, 2)  # channels first, as geographic tools write them
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.dtype(dtype))
    if dtype == "float32" and not np.isfinite(array).all():
        raise OSError("it holds values that are not finite")
    return array


def _require_layout(shape: tuple[int, ...], found: np.dtype[Any], channels: int, dtype: str) -> None:
    """Refuse, before they are read, arrays of another kind, empty ones and those that would fill the memory."""
    flat, deep = len(shape) == 2 and channels == 1, len(shape) == 3 and channels in (shape[0], shape[2])
    alike = found.newbyteorder("=") == np.dtype(dtype) or (dtype == "float32" and found.kind == "f")
    if not (flat or deep) or not alike:
        raise OSError(f"expected (H, W, {channels}) of {dtype}, found {tuple(shape)} of {found.name}")
    if min(shape) < 1:
        raise OSError(f"it has the shape {tuple(shape)}")
    if np.prod(shape, dtype=np.float64) * found.itemsize > MOST_BYTES:
        raise OSError(f"it claims to hold {tuple(shape)} values, more than any image that is read here")


def _read_npy(data: bytes, channels: int, dtype: str) -> NDArray[Any]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, found = read(file)
    if found.hasobject:
        raise OSError("it holds Python objects, which are never loaded")
    _require_layout(shape, found, channels, dtype)
    if np.prod(shape) * found.itemsize > len(data) - file.tell():
        raise OSError("it is truncated")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _read_tiff(data: bytes, channels: int, dtype: str) -> NDArray[Any]:
    try:
        import tifffile
    except ImportError as error:
        raise OSError("it is a TIFF that needs the package tifffile; pip install tifffile imagecodecs") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        # Not `file.series`: it never ends where pages follow one another in a circle, and puts zeros where other files
        # are named.
        first = file.pages[0]
        pages = {page.offset: page for page in islice(file.pages, _MOST_PAGES)}
        alike = [page for page in pages.values() if page.shape == first.shape]  # the others are thumbnails
        imagej = file.imagej_metadata or {}
        if len(alike) not in (1, channels) or imagej.get("images", 1) != imagej.get("channels", 1):
            raise OSError(f"it is a stack of {len(alike)} images; keep each in a file of its own")
        if first.dtype is None:
            raise OSError("it has values of an unknown type")
        shape = first.shape if len(alike) == 1 else (channels, *first.shape)
        _require_layout(shape, first.dtype, channels, dtype)
        _require_tiles(first.tilewidth, first.tilelength, first.shape)
        if len(alike) == 1:
            return first.asarray(maxworkers=1)
        return np.stack([page.asarray(maxworkers=1) for page in alike])


def _require_tiles(width: int, height: int, shape: tuple[int, ...]) -> None:
    """Refuse a TIFF with tiles that are much larger than the image, because each is read in full."""
    if width * height > max(_LARGEST_TILE, np.prod(shape, dtype=np.float64)):
        raise OSError(f"it claims to have tiles of {width} x {height} pixels")
