"""Decoding, geometry and augmentation of single images."""

import random
from collections.abc import Callable
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from datamodules import DataError
from datamodules.decode import DecodedImage, decode
from datamodules.preprocessing import Preprocessing
from datamodules.transforms import PRESETS, Augmentation
from tests.images import RECORD, encoded, preprocessing, smooth

# Decoding


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_colours_are_read_exactly_from_bytes_and_from_files(tmp_path, kind):
    pixels = smooth(9, 11)
    content = encoded(Image.fromarray(pixels), kind)
    found = decode(content)
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels)
    (tmp_path / "image").write_bytes(content)
    assert np.array_equal(decode(tmp_path / "image"), pixels)
    assert np.array_equal(decode(str(tmp_path / "image")), pixels)


@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"quality": 100, "subsampling": 0}), ("WEBP", {"quality": 100})]
)
def test_lossy_formats_are_read_closely(kind, options):
    pixels = smooth(32, 40)
    found = decode(encoded(Image.fromarray(pixels), kind, **options)).astype(int)
    assert found.shape == (32, 40, 3)
    assert np.abs(found - pixels).mean() < 3


def test_grey_images_become_three_equal_channels():
    grey = smooth(8, 8)[..., 0]
    for image in (Image.fromarray(grey), Image.merge("LA", [Image.fromarray(grey), Image.new("L", (8, 8), 3)])):
        found = decode(encoded(image, "PNG"))
        assert found.shape == (8, 8, 3)
        assert all(np.array_equal(found[..., channel], grey) for channel in range(3))
    black_and_white = Image.fromarray(grey).convert("1")
    assert np.array_equal(decode(encoded(black_and_white, "PNG"))[..., 1], np.asarray(black_and_white) * 255)


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 2))
    image.putpalette([250, 10, 20, 30, 240, 50, 60, 70, 230])
    image.putdata([0, 1, 2, 1])
    return image


PALETTE_PIXELS = [[[250, 10, 20], [30, 240, 50]], [[60, 70, 230], [30, 240, 50]]]


@pytest.mark.parametrize("options", [{}, {"transparency": 1}, {"transparency": bytes([255, 0, 100])}])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_images_get_their_colours_even_where_transparent(kind, options):
    if kind == "GIF" and isinstance(options.get("transparency"), bytes):
        options = {"transparency": 0}
    found = decode(encoded(palette_image(), kind, **options))
    assert found.tolist() == PALETTE_PIXELS


def test_an_alpha_channel_is_dropped_and_the_colour_below_it_kept():
    pixels = smooth(6, 7)
    alpha = np.arange(42, dtype=np.uint8).reshape(6, 7, 1)
    found = decode(encoded(Image.fromarray(np.concatenate([pixels, alpha], axis=-1)), "PNG"))
    assert np.array_equal(found, pixels)


def test_cmyk_becomes_rgb():
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (100, 50, 0, 30)]
    image = Image.new("CMYK", (len(inks), 1))
    image.putdata(inks)
    expected = [[(255 - c) * (255 - k) / 255 for c in (cyan, magenta, yellow)] for cyan, magenta, yellow, k in inks]
    found = decode(encoded(image, "TIFF")).astype(float)
    assert np.abs(found[0] - expected).max() <= 1
    flat = decode(encoded(Image.new("CMYK", (16, 16), inks[-1]), "JPEG", quality=100)).astype(float)
    assert np.abs(flat - expected[-1]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_upper_eight_bits(kind):
    values = np.array([[0, 255, 256, 257], [0x1234, 0x7FFF, 0x8000, 0xFFFF]], dtype=np.uint16)
    found = decode(encoded(Image.fromarray(values), kind))
    assert found.shape == (2, 4, 3)
    for channel in range(3):
        assert found[..., channel].tolist() == [[0, 0, 1, 1], [0x12, 0x7F, 0x80, 0xFF]]


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, k=-1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, k=1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_rotation_noted_in_exif_is_carried_out(orientation):
    stored = smooth(5, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(Image.fromarray(stored), "PNG", exif=exif))
    assert np.array_equal(found, UPRIGHT[orientation](stored))


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_a_truncated_image_raises_oserror(kind):
    content = encoded(Image.fromarray(smooth(16, 16)), kind)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        with pytest.raises(OSError):  # noqa: PT011 - the contract is the type; Pillow words it in many ways
            decode(content[: int(len(content) * share)])


@pytest.mark.parametrize("content", [b"", b"\x00", b"no image at all", b"\x89PNG\r\n\x1a\n", b"<svg></svg>"])
def test_what_is_no_image_raises_oserror(content):
    with pytest.raises(OSError):  # noqa: PT011 - as above
        decode(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_corrupted_image_is_decoded_or_raises_oserror_and_nothing_else(kind):
    rng = np.random.default_rng(0)
    content = encoded(Image.fromarray(smooth(12, 12)), kind)
    refused = 0
    for _ in range(200):
        corrupted = bytearray(content)
        for place in rng.integers(len(content), size=3):
            corrupted[place] = rng.integers(256)
        try:
            found = decode(bytes(corrupted))
        except OSError:
            refused += 1
        else:
            assert found.dtype == np.uint8
            assert found.shape[2] == 3
    assert refused > 0


# Geometry


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("height", "width"), [(300, 400), (400, 300), (257, 301), (48, 40), (20, 30), (64, 64), (500, 167)]
)
def test_fit_to_size_is_torchvisions_resize_and_centre_crop(height, width, interpolation):
    image = smooth(height, width)
    for size, crop, tolerance in ((224, 0.875, 2), (64, 0.5, 4), (64, 1.0, 4), (64, 0.875, 6)):
        # The wide tolerances are for the half pixel by which torchvision rounds sides and margins.
        found = preprocessing(size=size, crop=crop, interpolation=interpolation).fit_to_size(image)
        mode = v2.InterpolationMode(interpolation)
        reference = v2.Compose([v2.Resize(round(size / crop), interpolation=mode), v2.CenterCrop(size)])
        expected = np.asarray(reference(Image.fromarray(image))).astype(int)
        assert found.dtype == np.uint8
        assert found.shape == (size, size, 3)
        assert np.abs(found - expected).max() <= tolerance


def test_fit_to_size_is_timms_evaluation_transform():
    image = smooth(333, 250)
    transform = create_transform(
        (3, 224, 224), is_training=False, interpolation="bicubic", crop_pct=0.875, mean=(0, 0, 0), std=(1, 1, 1)
    )
    expected = (transform(Image.fromarray(image)) * 255).permute(1, 2, 0).numpy()
    found = preprocessing(size=224, interpolation="bicubic").fit_to_size(image)
    assert np.abs(found - expected).max() <= 2


def test_fit_to_size_keeps_the_centre_of_the_long_side():
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = 200  # exactly the centre square
    assert (preprocessing(crop=1.0).fit_to_size(wide)[:, 1:-1] == 200).all()
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    assert (preprocessing(crop=1.0).fit_to_size(tall)[1:-1] == 200).all()
    marked = np.zeros((64, 64, 3), np.uint8)
    marked[8:56, 8:56] = 200  # the centre that a crop of 3/4 keeps
    assert (preprocessing(crop=0.75, size=48).fit_to_size(marked) == 200).all()
    assert (preprocessing(crop=1.0, size=48).fit_to_size(marked)[0] == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (31, 33)])
def test_tiny_images_are_enlarged(size):
    image = np.full((*size, 3), 77, np.uint8)
    found = preprocessing(size=64).fit_to_size(image)
    assert found.shape == (64, 64, 3)
    assert (found == 77).all()


def test_a_record_survives_plain_types():
    made = preprocessing()
    assert made.mean == (0.5, 0.5, 0.5)
    assert made.to_dict() == RECORD
    assert type(made.to_dict()["std"]) is list
    assert Preprocessing.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    "wrong",
    [{"interpolation": "cubic"}, {"crop": 0.0}, {"crop": 1.1}, {"crop": -0.5}, {"size": 0}],
    ids=str,
)
def test_a_record_with_a_value_out_of_range_is_refused(wrong):
    ((_, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"expected .*{value}"):
        preprocessing(**wrong)


# Augmentation


def augmented(augmentation: Augmentation, image: np.ndarray, seed: int) -> np.ndarray:
    return augmentation(DecodedImage(image), np.random.SeedSequence(seed))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_decided_by_its_seed(preset):
    augmentation = Augmentation(preset, preprocessing())
    image = smooth(50, 70)
    pictures = [augmented(augmentation, image, seed) for seed in range(8)]
    for picture in pictures:
        assert picture.shape == (32, 32, 3)
        assert picture.dtype == np.uint8
    assert len({picture.tobytes() for picture in pictures}) == 8
    # Neither what came before nor the global generators, nor the very pipeline object matter.
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    other = Augmentation(preset, preprocessing())
    for seed in (5, 2, 2, 7):
        assert np.array_equal(augmented(augmentation, image, seed), pictures[seed])
        assert np.array_equal(augmented(other, image, seed), pictures[seed])
    assert torch.initial_seed() == 1
    assert torch.equal(torch.rand(1), torch.manual_seed(1) and torch.rand(1)), "the global generator has moved"


def test_a_list_with_nested_choices_is_decided_by_its_seed():
    def transforms() -> list[Any]:
        choice = A.OneOf([A.GaussNoise(p=1), A.RandomBrightnessContrast(p=1), A.HorizontalFlip(p=1)], p=0.9)
        return [A.RandomCrop(24, 24), A.SomeOf([choice, A.VerticalFlip(p=1)], n=1)]

    image = smooth(40, 48)
    augmentation, other = (Augmentation(transforms(), preprocessing()) for _ in range(2))
    pictures = [augmented(augmentation, image, seed) for seed in range(6)]
    assert len({picture.tobytes() for picture in pictures}) == 6
    for seed in (4, 0, 5):
        assert np.array_equal(augmented(other, image, seed), pictures[seed])


@pytest.mark.parametrize(
    ("transforms", "name"),
    [
        ([A.HorizontalFlip(), A.Normalize()], "Normalize"),
        ([ToTensorV2()], "ToTensorV2"),
        ([A.OneOf([A.VerticalFlip(), A.Normalize()])], "Normalize"),
        ([A.Compose([A.OneOf([A.Sequential([ToTensorV2()])])])], "ToTensorV2"),
        ([A.ToFloat()], "ToFloat"),
    ],
)
def test_normalising_and_making_tensors_is_refused_at_any_depth(transforms, name):
    with pytest.raises(DataError, match=rf"data\.train_transforms: .* found {name}; remove it"):
        Augmentation(transforms, preprocessing())


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(
        DataError, match=r"data\.train_transforms: expected light, standard, strong, trivial_augment .* 'strnog'"
    ):
        Augmentation("strnog", preprocessing())


def test_presets_differ_in_strength():
    image = smooth(64, 64)
    plain = preprocessing(crop=1.0).fit_to_size(image).astype(int)
    distance = {
        name: np.mean(
            [np.abs(augmented(Augmentation(name, preprocessing()), image, seed) - plain).mean() for seed in range(40)]
        )
        for name in PRESETS
    }
    assert distance["light"] < distance["standard"] < distance["strong"]
