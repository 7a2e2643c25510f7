"""What the audit learns from each file."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from datamodules.audit.inspection import as_rgb, inspect
from datamodules.contents import content_digest
from datamodules.storage import FileStorage, MemoryStorage
from tests.audit_data import encoded, scene


def facts_of(content, name="image.png", **options):
    return inspect(MemoryStorage([content]), [name], **options).facts[0]


@pytest.mark.parametrize(
    ("kind", "mode", "channels", "bits"),
    [
        ("PNG", "RGB", 3, 8),
        ("PNG", "L", 1, 8),
        ("PNG", "RGBA", 4, 8),
        ("PNG", "P", 1, 8),
        ("PNG", "1", 1, 1),
        ("PNG", "I;16", 1, 16),
        ("JPEG", "CMYK", 4, 8),
        ("TIFF", "I;16", 1, 16),
        ("BMP", "RGB", 3, 8),
        ("WEBP", "RGB", 3, 8),
    ],
)
def test_format_mode_and_depth(kind, mode, channels, bits):
    image = (
        scene(0).convert(mode)
        if mode != "I;16"
        else Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000)
    )
    fact = facts_of(encoded(image, kind), f"image.{kind.lower()}")
    assert fact.problem is None
    assert (fact.format, fact.mode, fact.channels, fact.bits) == (kind, mode, channels, bits)
    assert (fact.width, fact.height) == image.size
    assert not fact.misnamed
    assert not fact.animated


def test_colour_of_16_bits_is_seen_though_pillow_shows_8():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(">6H", 0, 1000, 2000, 30000, 40000, 65535))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    fact = facts_of(png)
    assert fact.problem is None
    assert (fact.mode, fact.channels, fact.bits) == ("RGB", 3, 16)


def test_sizes_are_those_of_the_upright_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    fact = facts_of(encoded(scene(0, 160, 120), "JPEG", exif=exif), "a.jpg")
    assert (fact.width, fact.height) == (120, 160)


def test_digests():
    picture = scene(1)
    png, bmp, other = encoded(picture), encoded(picture, "BMP"), encoded(scene(2))
    ours, same, different = (facts_of(content) for content in (png, bmp, other))
    assert ours.digest == hashlib.blake2b(png, digest_size=16).hexdigest() == content_digest(png)
    assert ours.bytes == len(png)
    assert ours.digest != same.digest
    assert ours.pixel_digest == same.pixel_digest != different.pixel_digest
    turned_on_its_side = facts_of(encoded(Image.new("RGB", (2, 8)))), facts_of(encoded(Image.new("RGB", (8, 2))))
    assert turned_on_its_side[0].pixel_digest != turned_on_its_side[1].pixel_digest


@pytest.mark.parametrize(
    ("name", "kind", "wrong"),
    [
        ("a.jpg", "PNG", True),
        ("a.JPEG", "JPEG", False),
        ("a.png", "JPEG", True),
        ("a.tif", "TIFF", False),
        ("a", "PNG", False),
    ],
)
def test_names_are_compared_with_contents(name, kind, wrong):
    assert facts_of(encoded(scene(0), kind), name).misnamed is wrong


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_files_with_several_pictures(kind):
    fact = facts_of(encoded(scene(0), kind, save_all=True, append_images=[scene(1), scene(2)]), f"a.{kind.lower()}")
    assert fact.frames == 3
    assert fact.animated


def test_the_preview_in_a_photograph_is_no_animation():
    fact = facts_of(encoded(scene(0), "MPO", save_all=True, append_images=[scene(0, 40, 30)]), "a.jpg")
    assert fact.frames == 2
    assert not fact.animated
    assert not fact.misnamed


JPEG = encoded(scene(0), "JPEG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (encoded(scene(0))[:-2000], "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\n <!DOCTYPE html><html>not found", "web page"),
        (b'{"error": "denied"}', "it is text"),
        (b"<svg xmlns='x'/>", "SVG"),
        (b"%PDF-1.4", "PDF"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "HEIC"),
        (bytes(5000), "zeros alone"),
        (b"hello, this is no picture", "it is no image"),
    ],
)
def test_reasons_why_a_file_cannot_be_read(content, reason):
    problem = facts_of(content).problem
    assert problem is not None
    assert reason in problem
    assert "0x" not in problem  # no addresses of Python objects


def test_files_that_are_not_there_are_named_and_others_still_read(tmp_path):
    scene(0).save(tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    names = ["missing.png", "a.png", "folder.png"]
    inspection = inspect(FileStorage(tmp_path, names), names)
    assert [fact.problem for fact in inspection.facts] == [
        "it cannot be opened: No such file or directory",
        None,
        "it cannot be opened: Is a directory",
    ]
    assert inspection.readable.tolist() == [False, True, False]
    assert inspection.grey[0].max() == 0 < inspection.grey[1].max()


def test_likenesses_are_the_picture_in_small():
    picture = Image.new("RGB", (200, 100), "black")
    picture.paste((255, 0, 0), (100, 0, 200, 100))
    inspection = inspect(MemoryStorage([encoded(picture)]), ["a.png"])
    assert inspection.grey.shape == (1, 64, 64)
    assert inspection.grey[0, :, :30].max() < 8
    assert np.abs(inspection.grey[0, :, 34:].astype(int) - 76).max() < 8  # the luma of red
    assert inspection.chroma[0, 1, :, 9:].min() > 220  # Cr of red
    assert np.abs(inspection.chroma[0, 1, :, :7].astype(int) - 128).max() < 8


def test_threads_change_nothing_and_progress_counts_to_the_end():
    contents = [encoded(scene(number)) for number in range(9)] + [b""]
    names = [f"{number}.png" for number in range(10)]
    calls = []
    several = inspect(MemoryStorage(contents), names, workers=4, progress=lambda *call: calls.append(call))
    single = inspect(MemoryStorage(contents), names, workers=1)
    assert several.facts == single.facts
    assert np.array_equal(several.grey, single.grey)
    assert calls == [(number, 10) for number in range(1, 11)]


def test_arrays_of_any_kind_by_another_decoder():
    array = np.linspace(0, 40_000, 20 * 30 * 5).reshape(20, 30, 5).astype(np.uint16)
    buffer = io.BytesIO()
    np.save(buffer, array)
    fact = facts_of(buffer.getvalue(), "a.npy", decode=lambda source: np.load(io.BytesIO(source)))
    assert (fact.format, fact.mode, fact.channels, fact.bits) == ("NPY", "uint16", 5, 16)
    assert (fact.width, fact.height) == (30, 20)
    assert not fact.misnamed


def test_anything_can_be_looked_at():
    wide = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(as_rgb(wide), wide)
    assert np.array_equal(as_rgb(wide[..., :1])[..., 2], wide[..., 0])
    assert np.array_equal(as_rgb(wide[..., :2])[..., 1], wide[..., 0])
    rng = np.random.default_rng(0)
    values = rng.normal(300, 20, (50, 50, 4)).astype(np.float32)
    values[0, 0] = np.nan
    values[0, 1] = np.inf
    shown = as_rgb(values)
    assert shown.shape == (50, 50, 3)
    assert shown.dtype == np.uint8
    assert shown.min() == 0
    assert shown.max() == 255
    middle = values[1:, :, 0] > np.median(values[1:, :, 0])
    assert shown[1:, :, 0][middle].min() >= shown[1:, :, 0][~middle].max()
    values[1, 0] = 1e6  # one hot pixel takes nothing from the others
    assert as_rgb(values)[2:].std() > 40
    assert as_rgb(np.full((3, 3, 1), 7.0, np.float32)).max() == 0


def test_the_grey_of_missing_data():
    pixels = np.asarray(scene(3)).copy()
    pixels[90:] = 128
    assert facts_of(encoded(Image.fromarray(pixels))).missing_rows == pytest.approx(0.25)
    pixels[-1, 0] = 129
    assert facts_of(encoded(Image.fromarray(pixels))).missing_rows == 0
    assert facts_of(encoded(Image.new("RGB", (20, 20), (128, 128, 128)))).missing_rows == 1
    pixels[-1, 0] = 128
    pixels[90:116] = 127
    assert facts_of(encoded(Image.fromarray(pixels))).missing_rows == 0  # four rows may be anything
