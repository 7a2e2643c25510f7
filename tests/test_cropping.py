"""The random crop: drawn like torchvision's, cut from no more pixels than it needs, and never from fewer."""

import io
import math

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop as Reference

from datamodules import DataError
from datamodules.cropping import RandomResizedCrop
from datamodules.decode import DecodedImage, EncodedImage
from datamodules.pyramid import PyramidImage, build_pyramid
from datamodules.transforms import Augmentation
from tests.images import preprocessing, smooth


def jpeg(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(smooth(height, width)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


class Spy:
    """A picture of any size that remembers the share it was asked for."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.share = math.nan

    def pixels(self, share: float = 1.0) -> np.ndarray:
        self.share = share
        reduction = next((n for n in (8, 4, 2) if n * share <= 1), 1)
        return np.zeros((-(-self.height // reduction), -(-self.width // reduction), 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), [(300, 300), (200, 500), (600, 250), (100, 1000)])
def test_crops_are_drawn_as_torchvision_draws_them(height: int, width: int) -> None:
    scale, ratio, draws = (0.08, 1.0), (3 / 4, 4 / 3), 4000
    ours, rng = RandomResizedCrop(32, 32, scale, ratio), np.random.default_rng(0)
    boxes = np.array([ours._draw(height, width, rng) for _ in range(draws)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = torch.empty(3, height, width)
        expected = np.array([Reference.get_params(image, scale, ratio) for _ in range(draws)], dtype=float)
    for quantity in (
        lambda box: box[:, 2] * box[:, 3] / (height * width),  # area
        lambda box: np.log(box[:, 3] / box[:, 2]),  # shape
        lambda box: (box[:, 0] + box[:, 2] / 2) / height,  # middle
        lambda box: (box[:, 1] + box[:, 3] / 2) / width,
    ):
        found, wanted = quantity(boxes), quantity(expected)
        # Rounding to pixels moves torchvision's by half a pixel at most.
        tolerance = 4 * wanted.std() / math.sqrt(draws) + 1 / min(height, width)
        assert abs(found.mean() - wanted.mean()) < tolerance
        assert np.abs(np.quantile(found, [0.1, 0.5, 0.9]) - np.quantile(wanted, [0.1, 0.5, 0.9])).max() < 0.06
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height + 1e-9).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width + 1e-9).all()


def test_a_reduced_image_is_never_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    resize = cv2.resize

    def remember(image: np.ndarray, size: tuple[int, int], **how: int) -> np.ndarray:
        seen.append(image.shape)
        return resize(image, size, **how)

    monkeypatch.setattr(cv2, "resize", remember)
    rng = np.random.default_rng(0)
    reduced = 0
    for _ in range(600):
        height, width = (int(side) for side in rng.integers(20, 3000, 2))
        size = int(rng.integers(16, 320))
        picture = Spy(height, width)
        seed = int(rng.integers(1 << 30))
        crop = RandomResizedCrop(size, size, (0.08, 1.0))
        assert crop(picture, np.random.default_rng(seed)).shape == (size, size, 3)
        _, _, crop_height, crop_width = crop._draw(height, width, np.random.default_rng(seed))
        assert seen[-1][0] >= min(size, math.floor(crop_height))
        assert seen[-1][1] >= min(size, math.floor(crop_width))
        reduced += picture.share <= 0.5
    assert reduced > 100, "hardly an image was reduced: nothing was shown"


def test_reduced_decoding_shows_the_same_part() -> None:
    content = jpeg(900, 1200)
    whole = DecodedImage(EncodedImage(content).pixels())
    crop = RandomResizedCrop(64, 64, (0.2, 1.0))
    for seed in range(8):
        fast = crop(EncodedImage(content), np.random.default_rng(seed)).astype(int)
        full = crop(whole, np.random.default_rng(seed)).astype(int)
        assert np.abs(fast - full).mean() < 2
        other = crop(whole, np.random.default_rng(seed + 100)).astype(int)
        assert np.abs(fast - other).mean() > 4


def test_a_pyramid_shows_the_same_part() -> None:
    image = smooth(900, 1201)
    pyramid = PyramidImage(build_pyramid(image, 500))
    assert min(pyramid.height, pyramid.width) == 500
    crop = RandomResizedCrop(64, 64, (0.2, 1.0))
    for seed in range(8):
        found = crop(pyramid, np.random.default_rng(seed)).astype(int)
        expected = crop(DecodedImage(image), np.random.default_rng(seed)).astype(int)
        assert np.abs(found - expected).mean() < 2


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 8), (8, 8), (9, 17), (33, 100), (100, 101)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_every_scale_of_a_pyramid_is_whole(size: tuple[int, int], channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 255, (*size, channels)).astype(np.uint8)
    pyramid = PyramidImage(build_pyramid(image, None))
    assert (pyramid.height, pyramid.width) == size
    assert np.array_equal(pyramid.pixels(), image)
    for share in (1.0, 0.6, 0.5, 0.3, 0.25, 0.01):
        part = pyramid.pixels(share)
        assert part.shape[0] >= share * size[0]
        assert part.shape[1] >= share * size[1]
        assert abs(part.astype(float).mean() - image.astype(float).mean()) < 25
        assert part.any()


def test_a_crop_of_albumentations_in_front_is_carried_out_while_reading() -> None:
    given = A.RandomResizedCrop(size=(32, 32), scale=(0.3, 0.9), ratio=(1.0, 1.0))
    made = Augmentation([given, A.HorizontalFlip()], preprocessing())
    assert made.crop == RandomResizedCrop(32, 32, (0.3, 0.9), (1.0, 1.0))
    assert [type(transform).__name__ for transform in made.compose.transforms] == ["HorizontalFlip"]


@pytest.mark.parametrize(
    "transforms",
    [
        [A.RandomResizedCrop(size=(32, 32), p=0.5)],
        [A.RandomResizedCrop(size=(32, 32), interpolation=cv2.INTER_CUBIC)],
        [A.HorizontalFlip(), A.RandomResizedCrop(size=(32, 32))],
        [A.RandomCrop(32, 32)],
        [],
    ],
)
def test_other_crops_are_left_to_albumentations(transforms: list) -> None:
    made = Augmentation(transforms, preprocessing())
    assert made.crop is None
    assert made.short_side is None
    assert len(made.compose.transforms) == len(transforms)


def test_the_cache_keeps_what_the_smallest_crop_needs() -> None:
    made = Augmentation([A.RandomResizedCrop(size=(224, 224), scale=(0.08, 1.0))], preprocessing(size=224))
    assert made.short_side is not None
    side = made.short_side * math.sqrt(0.08)
    assert side * math.sqrt(3 / 4) == pytest.approx(224, abs=1)


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (4, "uint8"), (7, "uint16"), (2, "float32")])
@pytest.mark.parametrize("preset", ["light", "standard", "strong"])
def test_presets_take_images_of_any_kind(preset: str, channels: int, dtype: str) -> None:
    record = preprocessing(channels=channels, dtype=dtype, mean=[0.0] * channels, std=[1.0] * channels)
    image = (np.random.default_rng(0).random((50, 70, channels)) * 200).astype(dtype)
    for seed in range(6):
        made = Augmentation(preset, record)(DecodedImage(image), np.random.SeedSequence(seed))
        assert made.shape == (32, 32, channels)
        assert made.dtype == dtype


def test_trivial_augment_knows_colours_alone() -> None:
    record = preprocessing(channels=1, mean=[0.0], std=[1.0])
    from datamodules.transforms import TrivialAugment

    with pytest.raises(DataError, match="TrivialAugment, which knows 3 of uint8 alone"):
        Augmentation([TrivialAugment()], record)
