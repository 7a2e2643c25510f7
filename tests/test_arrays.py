"""Images that are no photographs: files of other channels and types, and what is read of them."""

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from datamodules.decode import decode
from tests.images import encoded, smooth

RNG = np.random.default_rng(0)


def values(channels: int, dtype: str, height: int = 20, width: int = 34) -> np.ndarray:
    """Noise over all values that the type has; of floats, well beyond [0, 1]."""
    low, high = (-500, 4000) if dtype.startswith("float") else (0, np.iinfo(dtype).max)
    return RNG.uniform(low, high, (height, width, channels)).astype(dtype)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tiff(array: np.ndarray, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **settings)
    return buffer.getvalue()


# NPY

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "(H, W, C)": lambda array: array,
    "(C, H, W)": lambda array: np.moveaxis(array, 2, 0),
    "Fortran order": np.asfortranarray,
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_an_array_is_read_as_it_is(channels, dtype, layout):
    array = values(channels, dtype)
    found = decode(npy(LAYOUTS[layout](array)), channels, dtype)
    assert found.dtype == np.dtype(dtype)
    assert found.dtype.isnative
    assert found.flags.c_contiguous
    assert np.array_equal(found, array)


def test_an_array_without_an_axis_of_channels_has_one():
    array = values(1, "uint16")
    assert np.array_equal(decode(npy(array[..., 0]), 1, "uint16"), array)


def test_a_picture_as_an_array_is_read_for_any_network_of_three_channels(tmp_path):
    np.save(tmp_path / "x.npy", smooth(20, 30))
    assert np.array_equal(decode(tmp_path / "x.npy"), smooth(20, 30))


@pytest.mark.parametrize("kind", ["<f8", ">f8", "<f2"])
def test_other_floats_become_float32(kind):
    array = (values(2, "float64") / 1000).astype(kind)
    found = decode(npy(array), 2, "float32")
    assert found.dtype == np.float32
    assert np.array_equal(found, array.astype(np.float32))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_are_refused(wrong):
    array = values(2, "float64")
    array[3, 4, 1] = wrong
    for data in (npy(array), tiff(array, photometric="minisblack", planarconfig="contig")):
        with pytest.raises(OSError, match="values that are not finite"):
            decode(data, 2, "float32")


@pytest.mark.parametrize(
    ("array", "channels", "dtype", "said"),
    [
        (np.zeros((8, 9, 3), "uint8"), 5, "uint8", r"expected \(H, W, 5\) of uint8, found \(8, 9, 3\) of uint8"),
        (np.zeros((8, 9, 5), "uint8"), 5, "uint16", r"expected \(H, W, 5\) of uint16, found \(8, 9, 5\) of uint8"),
        (np.zeros((8, 9, 5), "int16"), 5, "uint16", r"found \(8, 9, 5\) of int16"),
        (np.zeros((8, 9, 1), "int64"), 1, "float32", r"found \(8, 9, 1\) of int64"),
        (np.zeros((8, 9), "uint16"), 3, "uint16", r"expected \(H, W, 3\) of uint16, found \(8, 9\) of uint16"),
        (np.zeros((2, 8, 9, 3), "uint16"), 3, "uint16", r"found \(2, 8, 9, 3\) of uint16"),
        (np.zeros(9, "uint16"), 1, "uint16", r"found \(9,\) of uint16"),
        (np.zeros((), "uint16"), 1, "uint16", r"found \(\) of uint16"),
        (np.zeros((8, 9), "bool"), 1, "uint8", r"found \(8, 9\) of bool"),
        (np.zeros((8, 9), "complex64"), 1, "float32", r"found \(8, 9\) of complex64"),
        (np.full((8, 9), "text"), 1, "uint8", r"found \(8, 9\) of str"),
    ],
    ids=str,
)
def test_another_kind_of_array_is_named(array, channels, dtype, said):
    with pytest.raises(OSError, match=said):
        decode(npy(array), channels, dtype)


# TIFF


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "packbits"])
@pytest.mark.parametrize("planar", ["contig", "separate", "pages"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [4, 7, 13])
def test_tiffs_of_many_channels_are_read_as_they_are(channels, dtype, planar, compression):
    array = values(channels, dtype)
    stored = array if planar == "contig" else np.moveaxis(array, 2, 0)
    config = {} if planar == "pages" else {"planarconfig": planar}
    settings = {"photometric": "minisblack", "compression": compression, **config}
    for own in ({}, {"byteorder": ">"}, {"rowsperstrip": 6}, {"tile": (16, 16)}, {"bigtiff": True}, {"metadata": None}):
        assert np.array_equal(decode(tiff(stored, **settings, **own), channels, dtype), array), own


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiffs_of_one_channel_are_read_as_they_are(dtype, compression):
    array = values(1, dtype)
    for own in ({}, {"byteorder": ">"}, {"rowsperstrip": 6}, {"tile": (16, 16)}):
        data = tiff(array[..., 0], compression=compression, **own)
        assert np.array_equal(decode(data, 1, dtype), array)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_colour_tiffs_of_eight_bits_are_read_in_both_layouts(planar, compression):
    array = values(3, "uint8")
    stored = array if planar == "contig" else np.moveaxis(array, 2, 0)
    data = tiff(stored, photometric="rgb", planarconfig=planar, compression=compression)
    assert np.array_equal(decode(data), array)
    sixteen = values(3, "uint16")
    stored = sixteen if planar == "contig" else np.moveaxis(sixteen, 2, 0)
    data = tiff(stored, photometric="rgb", planarconfig=planar, compression=compression)
    assert np.array_equal(decode(data, 3, "uint16"), sixteen)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_three_planes_that_are_no_colours_are_not_taken_for_a_grey_picture(planar, compression):
    array = values(3, "uint8")
    stored = array if planar == "contig" else np.moveaxis(array, 2, 0)
    data = tiff(stored, photometric="minisblack", planarconfig=planar, compression=compression)
    for channels in (1, 3):
        with pytest.raises(OSError, match=r"not marked as colours|of a kind that is not read"):
            decode(data, channels)


def test_a_picture_with_smaller_copies_of_itself_is_read():
    array = values(5, "uint16", 64, 64)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for step in (1, 2, 4):
            writer.write(array[::step, ::step], photometric="minisblack", planarconfig="contig", metadata=None)
    assert np.array_equal(decode(buffer.getvalue(), 5, "uint16"), array)


def test_channels_of_imagej_are_read_and_its_stacks_are_refused():
    array = values(5, "uint16")
    stored = np.moveaxis(array, 2, 0)
    assert np.array_equal(decode(tiff(stored, imagej=True, metadata={"axes": "CYX"}), 5, "uint16"), array)
    for axes in ("ZYX", "TYX"):
        data = tiff(stored, imagej=True, metadata={"axes": axes})
        for channels in (1, 5):
            with pytest.raises(OSError, match="it is a stack of 5 images; keep each in a file of its own"):
                decode(data, channels, "uint16")
    with pytest.raises(OSError, match="it is a stack of 10 images"):
        decode(tiff(np.stack([stored, stored]), imagej=True, metadata={"axes": "TCYX"}), 5, "uint16")
    with pytest.raises(OSError, match="it is a stack of 5 images"):
        decode(tiff(stored, photometric="minisblack"), 1, "uint16")


def test_where_tifffile_is_missing_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(OSError, match="a TIFF that needs the package tifffile; pip install tifffile imagecodecs"):
        decode(tiff(values(1, "uint16")[..., 0]), 1, "uint16")


# Values of more than eight bits elsewhere


def test_grey_pngs_of_sixteen_bits_keep_their_values():
    array = values(1, "uint16")
    for data in (encoded(Image.fromarray(array[..., 0]), "PNG"), encoded(Image.fromarray(array[..., 0]), "TIFF")):
        assert np.array_equal(decode(data, 1, "uint16"), array)
        assert np.array_equal(decode(data, 1, "uint8"), (array >> 8).astype(np.uint8))
    for channels, dtype in ((3, "uint16"), (1, "float32"), (5, "uint8")):
        with pytest.raises(OSError, match=f"expected {channels} channels of {dtype}, found an image of kind I;16"):
            decode(encoded(Image.fromarray(array[..., 0]), "PNG"), channels, dtype)


def test_values_of_thirty_two_bits_are_not_cut_down():
    array = np.arange(480, dtype=np.int32).reshape(20, 24)
    small = encoded(Image.fromarray(array * 100), "TIFF")
    assert np.array_equal(decode(small, 1)[..., 0], (array * 100) >> 8)
    for wrong in (array * 1000, array - 1):
        with pytest.raises(OSError, match="it has values of 32 bits"):
            decode(encoded(Image.fromarray(wrong), "TIFF"), 1)
    for channels in (1, 3):
        with pytest.raises(OSError, match="found an image of kind F"):
            decode(encoded(Image.fromarray(array.astype(np.float32) / 480), "TIFF"), channels)
