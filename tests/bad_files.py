"""Files that people may have, or may be given, and that are no plain picture; each made of a few bytes."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.images import encoded, smooth

PICTURE = Image.fromarray(smooth(40, 48))
JPEG = encoded(PICTURE, "JPEG")
HUGE = 13_000  # pixels of a side: the claim is within what is read, the data is not there


# Parts of formats


@cache
def zeros(count: int) -> bytes:
    """So many zero bytes, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    blocks = [packer.compress(bytes(min(2**20, count - done))) for done in range(0, count, 2**20)]
    return b"".join(blocks) + packer.flush()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, bits: int = 8, colour: int = 2, before: bytes = b"") -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def tiff(width: int, height: int, bits: int = 8, following: int = 0, data: bytes = bytes(500), **tags: Any) -> bytes:
    """Grey; ``tags`` are numbered like ``t322=...``."""
    values = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 400, 277: 1, 278: height, 279: len(data)}
    values |= {339: 3 if bits == 32 else 1} | {int(name[1:]): value for name, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, values[tag]) for tag in sorted(values))
    head = b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + struct.pack("<I", following)
    return head.ljust(400, b"\0") + data


def npy(shape: str, kind: str = "|u1", data: bytes = bytes(100)) -> bytes:
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def resized(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG that claims another size."""
    place = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    return jpeg[: place + 5] + struct.pack(">HH", height, width) + jpeg[place + 9 :]


def with_segment(marker: bytes, content: bytes) -> bytes:
    """A JPEG with something before its picture."""
    return JPEG[:2] + b"\xff" + marker + struct.pack(">H", len(content) + 2) + content + JPEG[2:]


def with_orientation(kind: int, count: int, value: bytes, cut: int = 0) -> bytes:
    entry = struct.pack("<HHI4s", 0x0112, kind, count, value)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)
    return with_segment(b"\xe1", exif[: len(exif) - cut])


def _jpeg_head(kind: bytes, width: int, height: int, components: int, symbol: int) -> bytes:
    def table(number: int, symbol: int) -> bytes:
        content = bytes([number, 1]) + bytes(15) + bytes([symbol])
        return b"\xff\xc4" + struct.pack(">H", len(content) + 2) + content

    frame = struct.pack(">HBHHB", 8 + 3 * components, 8, height, width, components)
    frame += b"".join(bytes([number + 1, 0x11, 0]) for number in range(components))
    quantities = b"\xff\xdb" + struct.pack(">H", 67) + b"\0" + bytes([1] * 64)
    return b"\xff\xd8" + quantities + b"\xff" + kind + frame + table(0x00, 0) + table(0x10, symbol)


def _scan(component: int, first: int, last: int, data: bytes) -> bytes:
    return b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([component, 0, first, last, 0]) + data


def planes(components: int, count: int) -> bytes:
    """A flat JPEG of 64 x 64 pixels, not progressive, whose components come one after another, the last many times."""
    numbers = [*range(1, components), *[components] * (count - components + 1)]
    body = b"".join(_scan(number, 0, 63, bytes(64 * 2 // 8)) for number in numbers)
    return _jpeg_head(b"\xc1", 64, 64, components, 0) + body + b"\xff\xd9"


def scans(width: int, height: int, count: int) -> bytes:
    """A progressive JPEG of that many scans, all but the first of them empty; a pass over the image each."""
    blocks = -(-width // 8) * -(-height // 8)
    runs = "".join("0" + "1" * 14 for _ in range(-(-blocks // 32767)))  # "the next 32,767 blocks are empty"
    runs += "1" * (-len(runs) % 8)
    empty = int(runs, 2).to_bytes(len(runs) // 8, "big").replace(b"\xff", b"\xff\0")
    start = _jpeg_head(b"\xc2", width, height, 1, 0xE0) + _scan(1, 0, 0, bytes(-(-blocks // 8)))
    return start + _scan(1, 1, 63, empty) * (count - 1) + b"\xff\xd9"


def _patched(data: bytes, place: int, patch: bytes) -> bytes:
    return data[:place] + patch + data[place + len(patch) :]


class CreatesFile:
    """What a pickle can do: this one makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def pickled(path: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[CreatesFile(path)]], dtype=object), allow_pickle=True)
    return buffer.getvalue()


GIF = encoded(PICTURE.quantize(16), "GIF")
WEBP = encoded(PICTURE, "WEBP", lossless=True)
BMP = encoded(PICTURE, "BMP")
_FRAME = GIF.find(b"\x2c" + bytes(4)) + 5  # where the first frame of the GIF says how large it is
_TILES: dict[str, Any] = {"data": zeros(2**29), "t259": 8, "t322": 32_768, "t323": 32_768, "t324": 400, "t325": 2**20}
_TOO_MANY = "claims more than 178,956,970 pixels"

#: Name, content, what is said of it (a regular expression).
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing.jpg": (b"", "it is empty"),
    "text.jpg": (b"a text", "it is no image"),
    "page.jpg": (b"\xef\xbb\xbf \n<!DOCTYPE html><html></html>", "it is a web page"),
    "page2.jpg": (b"<HTML><body>404</body></HTML>", "it is a web page"),
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    "drawing2.png": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "a PostScript document"),
    "document.jpg": (b"%PDF-1.7\n1 0 obj\n", "a PDF document"),
    "icon.png": (encoded(PICTURE.resize((32, 32)), "ICO"), "an icon"),
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "a HEIC image"),
    "new.jpg": (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(99), "an AVIF image"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "claims.png": (png(60_000, 60_000, zeros(1000)), _TOO_MANY),
    "no width.png": (png(0, 5, zeros(9)), "a PNG that is damaged"),
    "colour profile bomb.png": (png(9, 9, zeros(252), before=png_chunk(b"iCCP", b"x\0\0" + zeros(2**29))), "damaged"),
    "text bomb.png": (png(9, 9, zeros(252), before=png_chunk(b"zTXt", b"x\0\0" + zeros(2**29))), "damaged"),
    "text bomb 2.png": (png(9, 9, zeros(252), before=png_chunk(b"iTXt", b"x\0\1\0\0\0" + zeros(2**29))), "damaged"),
    "claims.jpg": (resized(JPEG, 65_500, 65_500), _TOO_MANY),
    "claims less.jpg": (resized(JPEG, HUGE, HUGE), "truncated"),
    "claims progressive.jpg": (resized(encoded(PICTURE, "JPEG", progressive=True), HUGE, HUGE), "truncated"),
    "no height.jpg": (resized(JPEG, 9, 0), "a JPEG that is damaged"),
    "scans.jpg": (scans(1000, 1000, 101), "more than 100 scans"),
    "many scans.jpg": (scans(8000, 8000, 20_000), "more than 100 scans"),
    "claims.gif": (_patched(GIF, 6, struct.pack("<HH", 65_535, 65_535)), _TOO_MANY),
    "claims in a frame.gif": (_patched(GIF, _FRAME, struct.pack("<HH", 65_535, 65_535)), _TOO_MANY),
    "empty frame.gif": (_patched(GIF, _FRAME, bytes(4)), "damaged"),
    "claims.bmp": (_patched(BMP, 18, struct.pack("<ii", 60_000, 60_000)), _TOO_MANY),
    "no size.bmp": (_patched(BMP, 18, bytes(8)), "a BMP that is damaged"),
    "claims less.bmp": (_patched(BMP, 18, struct.pack("<ii", HUGE, HUGE)), "truncated"),
    "claims.webp": (_patched(WEBP, 21, b"\xff\xff\xff\x0f"), _TOO_MANY),
    "claims less.webp": (_patched(WEBP, 21, struct.pack("<I", (HUGE - 1) | (HUGE - 1) << 14)), "decoder|read|memory"),
    "claims.tif": (tiff(60_000, 60_000), _TOO_MANY),
    "claims less.tif": (tiff(HUGE, HUGE), "truncated"),
    "claims packed.tif": (tiff(HUGE, HUGE, t259=8), "decoder error"),
    "tile bomb.tif": (
        tiff(9, 9, data=zeros(2**29), t259=8, t322=32_768, t323=32_768, t324=400, t325=2**20),
        "tiles of",
    ),
    "no width.tif": (tiff(0, 5), "a TIFF that is damaged"),
    "floats.tif": (tiff(9, 9, 32), "expected 3 channels of uint8, found an image of kind F"),
    "objects.npy": (pickled(Path("made by a pickle")), "Python objects, which are never loaded"),
    "claims.npy": (npy("(1000000, 1000000, 3)"), "claims to hold"),
    "overflows.npy": (npy("(4294967296, 4294967296, 3)"), "claims to hold"),
    "claims less.npy": (npy("(10000, 10000, 3)"), "truncated"),
    "negative.npy": (npy("(-5, -5, 3)"), r"shape \(-5, -5, 3\)"),
    "empty.npy": (npy("(0, 5, 3)"), r"shape \(0, 5, 3\)"),
    "of nothing.npy": (npy("(1000000000, 1000000000, 3)", "|S0"), "expected .* of uint8, found .* of bytes"),
    "records.npy": (npy("(5, 5, 3)", "[('a', '|u1')]".replace("'", '"')), "damaged|expected"),
    "nested.npy": (npy("(" * 9000), "damaged"),
    "head.npy": (b"\x93NUMPY", "damaged"),
    "long head.npy": (b"\x93NUMPY\x02\x00\xf0\xff\xff\xff{", "damaged"),
}

#: A TIFF of 16 bits whose pages follow one another in a circle.
CIRCLE = tiff(9, 9, 16, following=562, data=bytes(162) + struct.pack("<HI", 0, 8), t279=162)

#: The same of images of 16 bits and one channel, which other code reads.
REFUSED_ARRAYS: dict[str, tuple[bytes, str]] = {
    "claims.tif": (tiff(60_000, 60_000, 16), "claims to hold"),
    "claims less.tif": (tiff(HUGE, HUGE, 16), "damaged"),
    "claims packed.tif": (tiff(HUGE, HUGE, 16, t259=8), "damaged|memory"),
    "tile bomb.tif": (tiff(9, 9, 16, **_TILES), "tiles of"),
    "no width.tif": (tiff(0, 5, 16), "damaged|shape"),
    "text.tif": (b"II*a text", "damaged"),
    "claims.npy": (npy("(1000000, 1000000)", "<u2"), "claims to hold"),
    "colours.png": (encoded(PICTURE, "PNG"), "expected 1 channels of uint16, found an image of kind RGB"),
}


def _animation(kind: str) -> bytes:
    frames = [PICTURE, *(Image.new("RGB", PICTURE.size, colour) for colour in ("red", "blue"))]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)


def odd_but_sound() -> Iterator[tuple[str, bytes, Callable[[], np.ndarray] | None]]:
    """Name, content, and the pixels where they are those of ``PICTURE``, or of what is given."""
    plain = np.asarray(PICTURE)
    of_jpeg = np.asarray(Image.open(io.BytesIO(JPEG)))
    yield "png in name only.jpg", encoded(PICTURE, "PNG"), lambda: plain
    yield "animated.gif", _animation("GIF"), None
    yield "animated.webp", _animation("WEBP"), lambda: plain
    yield "animated.png", _animation("PNG"), lambda: plain
    yield "trailing.png", encoded(PICTURE, "PNG") + bytes(999), lambda: plain
    yield "data bomb.png", png(9, 9, zeros(2**29)), lambda: np.zeros((9, 9, 3), np.uint8)
    yield "no screen.gif", _patched(GIF, 6, bytes(4)), lambda: np.asarray(PICTURE.quantize(16).convert("RGB"))
    yield "pages in a circle.tif", tiff(9, 9, following=8), lambda: np.zeros((9, 9, 3), np.uint8)
    circle = struct.pack("<HI", 0, 8) + bytes(494)  # an empty page, after which the first comes again
    yield "pages in a circle of two.tif", tiff(9, 9, following=400, data=circle), None
    yield "trailing.jpg", JPEG + bytes(range(256)) * 40, lambda: of_jpeg
    yield "film behind.jpg", JPEG + b"\xff\xda" * 500, lambda: of_jpeg
    yield "preview.jpg", with_segment(b"\xe5", scans(8, 8, 200)[:60_000]), lambda: of_jpeg
    for name, value in (("0", 0), ("9", 9), ("65535", 65_535)):
        yield f"orientation {name}.jpg", with_orientation(3, 1, struct.pack("<HH", value, 0)), lambda: of_jpeg
    yield "orientation text.jpg", with_orientation(2, 4, b"abc\0"), lambda: of_jpeg
    yield "orientation not a number.jpg", with_orientation(11, 1, struct.pack("<f", np.nan)), lambda: of_jpeg
    yield "orientation elsewhere.jpg", with_orientation(5, 1, struct.pack("<I", 10**6)), lambda: of_jpeg
    yield "orientation of giants.jpg", with_orientation(1, 0xFFFFFFF0, bytes(4)), lambda: of_jpeg
    yield "exif cut.jpg", with_orientation(3, 1, struct.pack("<HH", 6, 0), cut=8), lambda: of_jpeg
    for number, junk in enumerate(
        (b"", b"II", bytes(range(200)), b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff")
    ):
        yield f"exif junk {number}.jpg", with_segment(b"\xe1", b"Exif\0\0" + junk), lambda: of_jpeg
    yield "mpo junk.jpg", with_segment(b"\xe2", b"MPF\0II*\0\xff\xff\xff\xff"), lambda: of_jpeg
    yield "icc junk.jpg", with_segment(b"\xe2", b"ICC_PROFILE\0\0\0"), lambda: of_jpeg
