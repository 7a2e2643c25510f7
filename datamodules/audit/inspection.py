"""Looks at every image once: what kind of file it is, whether it can be read, and a small likeness for comparisons."""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules import decode as decoding
from datamodules.contents import content_digest
from datamodules.storage import Storage

#: From an encoded image to pixels ``(H, W, C)``: uint8, uint16 or float32. Raises OSError where it cannot.
Decode = Callable[[Path | bytes], NDArray[Any]]
#: Called with how many images are done, and of how many.
Progress = Callable[[int, int], None]

#: Side of the likenesses that are compared, in pixels, and of their colours.
SIDE = 64
CHROMA_SIDE = 16

# What a file with such an ending may hold, as Pillow calls it. A JPEG with several pictures in it calls itself MPO.
_FORMATS = {
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".bmp": ("BMP", "DIB"),
    ".gif": ("GIF",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".webp": ("WEBP",),
    ".npy": ("NPY",),
}
_MODE_BITS = {"1": 1, "I;16": 16, "I;16B": 16, "I;16L": 16, "I;16N": 16, "I": 32, "F": 32}
_BITS_PER_SAMPLE = 258  # of TIFF

_GREY_OF_NOTHING = 128  # what JPEG decoders put where data is missing


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one image.

    Attributes:
        problem: why it cannot be read; None: it can. Of an unreadable image the other facts may be missing.
        bytes: length of the encoded image.
        digest: SHA-256 of the encoded image.
        pixel_digest: SHA-256 of the decoded pixels with their shape and type.
        format: as Pillow calls it (``JPEG``), or ``NPY``.
        width: in pixels, upright; of an unreadable image as its head says.
        height: likewise.
        mode: as Pillow calls it (``RGB``), or the type of an array (``float32``).
        channels: as stored; a palette counts as one.
        bits: of one channel of one pixel.
        frames: pictures in the file; only the first is used.
        misnamed: whether the file's ending promises another format.
        missing_rows: share of the picture, from below, that is the flat grey of missing JPEG data.
    """

    problem: str | None = None
    bytes: int = 0
    digest: str = ""
    pixel_digest: str = ""
    format: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    channels: int = 0
    bits: int = 0
    frames: int = 1
    misnamed: bool = False
    missing_rows: float = 0.0

    @property
    def animated(self) -> bool:
        """Whether the file holds several pictures (the preview inside a photograph does not count)."""
        return self.frames > 1 and self.format != "MPO"


@dataclass(frozen=True)
class Inspection:
    """What is known of all images.

    Attributes:
        facts: one an image.
        grey: likenesses stretched to a square, uint8 ``(N, 64, 64)``; zeros where unreadable.
        chroma: their colours (Cb, Cr), uint8 ``(N, 2, 16, 16)``; 128 is no colour.
    """

    facts: list[ImageFacts]
    grey: NDArray[np.uint8]
    chroma: NDArray[np.uint8]

    @property
    def readable(self) -> NDArray[np.bool_]:
        """Which images can be read, ``(N,)``."""
        return np.array([fact.problem is None for fact in self.facts], bool)


def inspect(
    storage: Storage,
    paths: Sequence[str],
    decode: Decode = decoding.decode,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Inspection:
    """Read and decode every image once.

    Args:
        storage: where they lie.
        paths: what they are called; the ending is compared with the content.
        decode: from an encoded image to pixels.
        progress: called after each image.
        workers: threads; None: one for each core, at most 8.

    Returns:
        The facts, in the order of ``paths``; nothing is raised for an image that cannot be read.
    """
    grey = np.zeros((len(paths), SIDE, SIDE), np.uint8)
    chroma = np.full((len(paths), 2, CHROMA_SIDE, CHROMA_SIDE), 128, np.uint8)

    def look(row: int) -> ImageFacts:
        fact, likeness = _inspect_one(storage, row, paths[row], decode)
        if likeness is not None:
            grey[row], chroma[row] = likeness
        return fact

    facts = []
    with ThreadPoolExecutor(_cores() if workers is None else workers) as pool:
        for fact in pool.map(look, range(len(paths))):
            facts.append(fact)
            if progress is not None:
                progress(len(facts), len(paths))
    return Inspection(facts, grey, chroma)


def as_rgb(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Any decoded image as one that can be looked at.

    Args:
        pixels: ``(H, W, C)``, of any number type.

    Returns:
        uint8 ``(H, W, 3)``: of more than three channels the first three, of fewer the first; what is not 8 bit is
        scaled, channel by channel, so that its 1st to 99th percentile fill 0 to 255.

    Example:
        >>> as_rgb(np.array([[[0.0], [10.0]]], np.float32))[0, :, 0]
        array([  0, 255], dtype=uint8)
    """
    chosen = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
    if chosen.dtype == np.uint8:
        return np.ascontiguousarray(chosen)
    values = np.nan_to_num(chosen.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = np.percentile(values, (1, 99), axis=(0, 1))
    scaled = (values - low) / np.where(high > low, high - low, 1)
    return np.rint(scaled.clip(0, 1) * 255).astype(np.uint8)


def _inspect_one(
    storage: Storage, row: int, path: str, decode: Decode
) -> tuple[ImageFacts, tuple[NDArray[np.uint8], NDArray[np.uint8]] | None]:
    try:
        source = storage.source(row)
        content = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        return ImageFacts(problem=f"it cannot be opened: {error.strerror or error}"), None
    known: dict[str, Any] = {"bytes": len(content), "digest": content_digest(content), **_header(content)}
    known["misnamed"] = _misnamed(path, known.get("format", ""))
    try:
        pixels = decode(content)
    except OSError as error:
        return ImageFacts(problem=" ".join(str(error).split()), **known), None
    height, width, channels = pixels.shape
    if "mode" not in known:  # an array, which Pillow does not know
        known |= {"mode": str(pixels.dtype), "channels": channels, "bits": 8 * pixels.dtype.itemsize}
    known |= {"width": width, "height": height, "pixel_digest": _pixel_digest(pixels)}
    rgb = as_rgb(pixels)
    known["missing_rows"] = _missing_rows(rgb)
    return ImageFacts(**known), _likeness(rgb)


def _header(content: bytes) -> dict[str, Any]:
    """What the head of a file says; what it does not say is left out."""
    if content.startswith(b"\x93NUMPY"):
        return {"format": "NPY"}
    try:
        with Image.open(io.BytesIO(content)) as image:
            return {
                "format": image.format or "",
                "width": image.width,
                "height": image.height,
                "mode": image.mode,
                "channels": len(image.getbands()),
                "bits": _bits(image, content),
                "frames": getattr(image, "n_frames", 1),
            }
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return {}  # no picture that Pillow knows, or a damaged one: the decoder has the last word


def _bits(image: Image.Image, content: bytes) -> int:
    if image.format == "PNG":
        return content[24]  # Pillow shows 16-bit colour as 8 bits; the header tells
    if image.format == "TIFF":
        stored = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, 8)
        return int(stored[0] if isinstance(stored, tuple) else stored)
    return _MODE_BITS.get(image.mode, 8)


def _misnamed(path: str, found: str) -> bool:
    expected = _FORMATS.get(PurePosixPath(path).suffix.lower())
    return bool(found) and expected is not None and found not in expected


def _pixel_digest(pixels: NDArray[Any]) -> str:
    sha = hashlib.sha256(f"{pixels.shape} {pixels.dtype.str}".encode())
    sha.update(np.ascontiguousarray(pixels).data)
    return sha.hexdigest()


def _missing_rows(rgb: NDArray[np.uint8]) -> float:
    if (rgb[-1] != _GREY_OF_NOTHING).any():
        return 0.0
    whole = (rgb == _GREY_OF_NOTHING).all((1, 2))
    rows = len(rgb) if whole.all() else int(np.argmin(whole[::-1]))
    return rows / len(rgb) if rows >= 8 else 0.0


def _likeness(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    small = Image.fromarray(rgb).resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    bands = np.asarray(small.convert("YCbCr"))
    block = SIDE // CHROMA_SIDE
    colours = bands[..., 1:].reshape(CHROMA_SIDE, block, CHROMA_SIDE, block, 2).mean((1, 3))
    return bands[..., 0], np.rint(colours).astype(np.uint8).transpose(2, 0, 1)


def _cores() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, available or 1)
