"""Decoding at a part of the size: the same bits by either library, never less than asked for, upright."""

import io
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageOps

import datamodules.decode
from datamodules.decode import DecodedImage, EncodedImage, decode
from tests.images import encoded, smooth

SHARES = (1 / 16, 1 / 8, 0.13, 0.2, 1 / 4, 0.3, 1 / 2, 0.51, 0.9, 1.0)
SIZES = [(64, 80), (65, 81), (63, 79), (1, 1), (1, 100), (7, 9), (8, 8), (16, 17), (257, 131)]
KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": 0},
    "poor": {"quality": 5},
    "restarts": {"restart_marker_blocks": 3},
    "optimised": {"optimize": True},
}


def detailed(height: int, width: int) -> Image.Image:
    """A picture with detail at every scale, so that no two ways of reading it come out alike by chance."""
    noise = np.random.default_rng(height * 1000 + width).normal(0, 40, (height, width, 3))
    return Image.fromarray(np.clip(smooth(height, width) + noise, 0, 255).astype(np.uint8))


def pixels(data: bytes, share: float, channels: int = 3) -> np.ndarray:
    return EncodedImage(data, channels).pixels(share)


@pytest.fixture
def by_pillow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """Pixels as they come where simplejpeg is not installed."""

    def read(data: bytes, share: float, channels: int = 3) -> np.ndarray:
        with monkeypatch.context() as patch:
            patch.setattr("datamodules.decode.simplejpeg", None)
            return pixels(data, share, channels)

    return read


@pytest.fixture
def fast_reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What simplejpeg has decoded."""
    done: list[Any] = []
    library = datamodules.decode.simplejpeg

    class Watched:
        @staticmethod
        def decode_jpeg(*args: Any, **settings: Any) -> Any:
            found = library.decode_jpeg(*args, **settings)
            done.append(found)
            return found

    monkeypatch.setattr("datamodules.decode.simplejpeg", Watched)
    return done


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_libraries_give_the_same_bits_at_every_scale(kind, size, by_pillow, fast_reads):
    data = encoded(detailed(*size), "JPEG", **KINDS[kind])
    for share in SHARES:
        found = pixels(data, share)
        assert np.array_equal(found, by_pillow(data, share))
    assert len(fast_reads) == len(SHARES)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(found, np.asarray(image))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grey_jpegs_are_the_same_too(size, channels, by_pillow, fast_reads):
    grey = detailed(*size).convert("L")
    data = encoded(grey, "JPEG")
    for share in SHARES:
        found = pixels(data, share, channels)
        assert found.shape[2] == channels
        assert np.array_equal(found, by_pillow(data, share, channels))
    assert len(fast_reads) == len(SHARES)
    with Image.open(io.BytesIO(data)) as image:
        assert all(np.array_equal(found[..., channel], np.asarray(image)) for channel in range(channels))


def test_colour_read_as_grey_is_the_same(by_pillow):
    data = encoded(detailed(64, 81), "JPEG")
    for share in SHARES:
        assert np.array_equal(pixels(data, share, 1), by_pillow(data, share, 1))
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(pixels(data, 1.0, 1)[..., 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_scale_that_is_asked_for_is_never_undercut(size, by_pillow):
    data = encoded(detailed(*size), "JPEG")
    for share in (*SHARES, *np.random.default_rng(0).random(20)):
        for found in (pixels(data, share), by_pillow(data, share)):
            for side, whole in zip(found.shape, size, strict=False):
                assert side >= share * whole
                assert side <= whole
                # Nor is it exceeded by a factor of two, down to the smallest scale there is.
                assert min(size) < 8 or side <= max(2 * share, 1 / 8) * whole + 1


def test_less_is_decoded_where_less_is_enough():
    data = encoded(detailed(64, 80), "JPEG")
    expected = {
        1.0: (64, 80),
        0.51: (64, 80),
        0.5: (32, 40),
        0.26: (32, 40),
        0.25: (16, 20),
        0.125: (8, 10),
        0.01: (8, 10),
    }
    assert {share: pixels(data, share).shape[:2] for share in expected} == expected


def test_a_reduced_image_looks_like_the_whole_one_made_smaller():
    picture = Image.fromarray(smooth(160, 240))
    data = encoded(picture, "JPEG", quality=95, subsampling=0)
    for reduction in (2, 4, 8):
        found = pixels(data, 1 / reduction).astype(int)
        expected = np.asarray(picture.reduce(reduction)).astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 2


@pytest.mark.parametrize("size", [(40, 56), (41, 55)], ids=str)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_at_every_scale(orientation, size, by_pillow):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = detailed(*size)
    data = encoded(picture, "JPEG", exif=exif, quality=100, subsampling=0)
    with Image.open(io.BytesIO(data)) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored))
    image = EncodedImage(data)
    assert (image.height, image.width) == upright.shape[:2]
    assert np.array_equal(image.pixels(), upright)
    assert np.array_equal(by_pillow(data, 1.0), upright)
    for share in (1 / 2, 1 / 4, 1 / 8):
        with Image.open(io.BytesIO(data)) as stored:
            stored.draft(None, tuple(int(side * share) for side in stored.size))
            expected = np.asarray(ImageOps.exif_transpose(stored))
        assert np.array_equal(pixels(data, share), expected)
        assert np.array_equal(by_pillow(data, share), expected)
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(picture, kind, exif=exif, **options)
        image = EncodedImage(data)
        with Image.open(io.BytesIO(data)) as stored:
            upright = np.asarray(ImageOps.exif_transpose(stored))
        assert (image.height, image.width) == upright.shape[:2]
        assert np.array_equal(image.pixels(1 / 8), upright)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP"])
def test_other_formats_come_at_full_size(kind):
    data = encoded(detailed(64, 80), kind)
    for share in SHARES:
        assert np.array_equal(pixels(data, share), decode(data))
    assert decode(data).shape == (64, 80, 3)


def test_an_array_comes_at_full_size():
    picture = smooth(20, 30)
    image = DecodedImage(picture)
    assert (image.height, image.width) == (20, 30)
    assert image.pixels(0.1) is picture


@pytest.mark.parametrize("library", ["simplejpeg", "Pillow"])
def test_an_image_may_be_read_again_at_another_scale(library, monkeypatch):
    if library == "Pillow":
        monkeypatch.setattr("datamodules.decode.simplejpeg", None)
    for kind in ("JPEG", "PNG"):
        data = encoded(detailed(64, 80), kind)
        image = EncodedImage(data)
        for share in (1 / 8, 1.0, 1 / 2, 1 / 8):
            assert np.array_equal(image.pixels(share), pixels(data, share))
            assert (image.height, image.width) == (64, 80)


def test_what_is_read_is_the_callers_own():
    for data in (encoded(detailed(8, 9), "JPEG"), encoded(detailed(8, 9), "PNG")):
        image = EncodedImage(data)
        found = image.pixels()
        assert found.flags.c_contiguous
        before = found.copy()
        assert np.array_equal(image.pixels(), before)


# Inks: JPEGs of print shops, that only Pillow reads


@pytest.mark.parametrize("stored", ["CMYK", "YCCK"])
def test_inks_become_light(stored, fast_reads):
    # Adobe stores inks inverted, and so do all that write such files; a reader must turn them.
    light = smooth(48, 64)
    inks = np.dstack([255 - light, np.zeros((48, 64, 1), np.uint8)])
    data = imagecodecs.jpeg8_encode(255 - inks, level=98, colorspace="CMYK", outcolorspace=stored, subsampling="444")
    if b"Adobe" not in data:
        data = data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + (b"\2" if stored == "YCCK" else b"\0") + data[2:]
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
    assert np.abs(decode(data).astype(int) - light).mean() < 3
    assert pixels(data, 1 / 4).shape == (12, 16, 3)
    assert not fast_reads


# Forms of PNG


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 1), ("LA", 1), ("P", 1), ("1", 1), ("I;16", 1)])
def test_one_channel_is_made_of_any_form(mode, channels):
    picture = Image.fromarray(smooth(20, 24))
    if mode == "I;16":
        values = np.arange(480, dtype=np.uint16).reshape(20, 24) * 136
        image, expected = Image.fromarray(values), (values >> 8).astype(np.uint8)
    else:
        image = picture.convert("L").convert(mode) if mode == "LA" else picture.convert(mode)
        plain = image.convert("RGB") if mode == "P" else image
        expected = np.asarray(plain.convert("L"))
    found = decode(encoded(image, "PNG"), channels=1)
    assert found.shape == (20, 24, 1)
    assert np.array_equal(found[..., 0], expected)


def test_four_channels_are_colour_and_opacity():
    pixels = np.dstack([smooth(20, 24), np.arange(480, dtype=np.uint16).reshape(20, 24, 1).astype(np.uint8)])
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert np.array_equal(decode(encoded(Image.fromarray(pixels), kind, **options), channels=4), pixels)
    with pytest.raises(OSError, match="expected 4 channels of uint8, found an image of kind RGB"):
        decode(encoded(Image.fromarray(pixels[..., :3]), "PNG"), channels=4)
