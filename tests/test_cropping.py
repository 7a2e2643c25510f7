"""Training images: which part of a picture is cut out, how, and what transforms may follow."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop
from torchvision.transforms import v2

from datamodules import DataError, cropping
from datamodules.cropping import RandomResizedCrop
from datamodules.decode import DecodedImage, EncodedImage
from datamodules.pyramid import PyramidImage, build_pyramid
from datamodules.transforms import PRESETS, Augmentation, TrivialAugment
from tests.images import encoded, folder_module, preprocessing, smooth


class Places:
    """A picture whose values are the places of its pixels, row and column from 0 to 1.

    Args:
        height: in pixels.
        width: in pixels.
        reductions: at which it can be read, as a JPEG can.
    """

    def __init__(self, height: int, width: int, reductions: tuple[int, ...] = (8, 4, 2)) -> None:
        self.height, self.width = height, width
        self.reductions = reductions
        self.shares: list[float] = []
        self.reduction = 1

    def pixels(self, share: float = 1.0) -> np.ndarray:
        self.shares.append(share)
        self.reduction = next((n for n in self.reductions if n * share <= 1), 1)
        return _places(self.height, self.width, self.reduction)


@cache
def _places(height: int, width: int, n: int) -> np.ndarray:
    y, x = np.mgrid[0 : -(-height // n), 0 : -(-width // n)]
    return np.stack([(y + 0.5) * n / height, (x + 0.5) * n / width], axis=-1)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What was cut out, before it was resized."""
    parts: list[np.ndarray] = []
    resize = cropping.resize

    def watched(image: np.ndarray, *args: Any, **settings: Any) -> np.ndarray:
        parts.append(image)
        return resize(image, *args, **settings)

    monkeypatch.setattr("datamodules.cropping.resize", watched)
    return parts


def box(picture: Places, part: np.ndarray) -> np.ndarray:
    """Top, left, bottom and right of what was cut out, in pixels of the whole picture."""
    size = np.array([picture.height, picture.width])
    return np.concatenate([part[0, 0] * size - picture.reduction / 2, part[-1, -1] * size + picture.reduction / 2])


# Which part


STANDARD = (3 / 4, 4 / 3)


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), STANDARD), ((0.25, 1.0), STANDARD), ((0.3, 0.6), (0.5, 3.0))]
)
@pytest.mark.parametrize(("height", "width"), [(500, 500), (400, 600), (900, 300), (300, 1500)])
def test_crops_are_distributed_as_torchvisions(height, width, scale, ratio, cut):
    draws = 2500
    picture = Places(height, width, reductions=())
    for seed in range(draws):
        RandomResizedCrop(8, 8, scale, ratio)(picture, np.random.default_rng(seed))
    ours = np.array([box(picture, part) for part in cut])
    torch.manual_seed(0)
    image = torch.empty((1, height, width), device="meta")
    theirs = np.array([TorchvisionCrop.get_params(image, list(scale), list(ratio)) for _ in range(draws)], dtype=float)
    theirs[:, 2:] += theirs[:, :2]

    def qualities(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, bottom, right = boxes.T
        area = (bottom - top) * (right - left) / (height * width)
        return {
            "area": area.round(2),  # both round to whole pixels, in their own way
            "shape": np.log((right - left) / (bottom - top)).round(1),
            "row": (top + bottom) / 2 + np.random.default_rng(1).random(draws),
            "column": (left + right) / 2 + np.random.default_rng(1).random(draws),
        }

    found, expected = qualities(ours), qualities(theirs)
    distances = {name: ks_2samp(found[name], expected[name]).statistic for name in found}
    assert max(distances.values()) < 0.055, distances  # by chance: once in a thousand


@pytest.mark.parametrize(("height", "width"), [(2000, 100), (100, 2000), (1000, 30), (30, 1000)])
def test_of_a_very_long_picture_the_middle_is_taken(height, width, cut):
    image = torch.empty((1, height, width), device="meta")
    top, left, tall, wide = TorchvisionCrop.get_params(image, [0.5, 1.0], list(STANDARD))
    for seed in range(3):
        picture = Places(height, width)
        RandomResizedCrop(8, 8, (0.5, 1.0))(picture, np.random.default_rng(seed))
        assert np.allclose(box(picture, cut[-1]), (top, left, top + tall, left + wide), atol=picture.reduction + 1)


def test_what_is_drawn_depends_on_seed_and_shape_alone():
    crop = RandomResizedCrop(32, 32, (0.1, 1.0))
    pictures = [DecodedImage(smooth(100, 140)), DecodedImage(smooth(100, 140))]
    first = [crop(picture, np.random.default_rng(seed)) for seed in range(5) for picture in pictures]
    np.random.seed(3)
    again = [crop(picture, np.random.default_rng(seed)) for seed in range(5) for picture in pictures]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({image.tobytes() for image in first}) == 5


def test_no_crop_is_smaller_than_the_smallest_share_says(cut):
    for scale, ratio in (((0.08, 1.0), STANDARD), ((0.5, 1.0), (0.3, 1.2)), ((1.0, 1.0), (1.0, 1.0))):
        crop, picture = RandomResizedCrop(8, 8, scale, ratio), Places(400, 400, reductions=())
        cut.clear()
        for seed in range(400):
            crop(picture, np.random.default_rng(seed))
        smallest = min(min(part.shape[:2]) / 400 for part in cut)
        assert smallest >= crop.smallest_share
        assert smallest < crop.smallest_share + (0.03 if ratio != (0.3, 1.2) else 0.2)


# At which scale


def cases(count: int) -> Iterator[tuple[RandomResizedCrop, int, int, int]]:
    """A crop, height and width of a picture, and a seed; in some the crop is enlarged."""
    rng = np.random.default_rng(0)
    for seed in range(count):
        target = rng.integers(8, 80, 2)
        height, width = (target * np.exp(rng.uniform(-1, 3, 2))).astype(int) + 1
        crop = RandomResizedCrop(int(target[0]), int(target[1]), (float(rng.uniform(0.05, 0.9)), 1.0))
        yield crop, int(height), int(width), seed


def test_a_reduced_scale_never_makes_a_crop_smaller_than_what_becomes_of_it(cut):
    reduced = 0
    for crop, height, width, seed in cases(500):
        whole, by_halves = Places(height, width, reductions=()), Places(height, width)
        pyramid = PyramidImage(build_pyramid(np.zeros((height, width, 3), np.uint8), None))
        for picture in (whole, by_halves, pyramid):
            crop(picture, np.random.default_rng(seed))
        full, *others = (np.array(part.shape[:2]) for part in cut[-3:])
        target = np.array([crop.height, crop.width])
        for found in others:
            assert (found >= np.minimum(full, target)).all()
        assert whole.shares == by_halves.shares
        (share,) = whole.shares
        assert share == pytest.approx(min(1, (target / full).max()), abs=2 / full.min())
        if share > 1 / 8:  # no more is read than needed: at half of it, it would be too small
            assert (others[0] - 2 < 2 * target).any()
        reduced += by_halves.reduction > 1
    assert reduced > 100


def test_the_place_of_a_crop_does_not_move_with_the_scale(cut):
    for crop, height, width, seed in cases(500):
        pictures = Places(height, width, reductions=()), Places(height, width)
        for picture in pictures:
            crop(picture, np.random.default_rng(seed))
        full, reduced = (box(picture, part) for picture, part in zip(pictures, cut[-2:], strict=True))
        # A pixel at the reduced scale, and as much for sides that it does not divide.
        assert np.abs(reduced - full).max() < 2 * pictures[1].reduction


@pytest.mark.parametrize("reader", ["JPEG", "pyramid", "kept smaller"])
def test_a_crop_of_a_reduced_image_shows_the_same_and_looks_the_same(reader):
    picture = smooth(600, 840)
    data = encoded(Image.fromarray(picture), "JPEG", quality=95, subsampling=0)
    crop = RandomResizedCrop(48, 48, (0.25, 1.0))
    augmentation = Augmentation([A.RandomResizedCrop(size=(48, 48), scale=(0.25, 1.0))], preprocessing(size=48))
    differences = []
    for seed in range(25):
        full = crop(DecodedImage(picture), np.random.default_rng(seed)).astype(int)
        source: Any = EncodedImage(data)
        if reader != "JPEG":
            source = PyramidImage(build_pyramid(picture, augmentation.short_side if reader == "kept smaller" else None))
        found = crop(source, np.random.default_rng(seed)).astype(int)
        differences.append(np.abs(found - full).mean())
    assert max(differences) < 4
    assert np.mean(differences) < 2


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 13])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_every_channel_of_any_image_is_cut_alike(channels, dtype):
    scale = {"uint8": 1, "uint16": 257, "float32": 37.5}[dtype]
    plane = (smooth(90, 120)[..., :1].astype(np.float64) * scale).astype(dtype)
    crop = RandomResizedCrop(24, 40, (0.2, 1.0))
    image = np.repeat(plane, channels, axis=2)
    image[..., -1] = image[..., -1] // 2 if dtype != "float32" else image[..., -1] / 2
    found = crop(DecodedImage(image), np.random.default_rng(3))
    assert found.shape == (24, 40, channels)
    assert found.dtype == dtype
    alone = crop(DecodedImage(plane), np.random.default_rng(3))
    assert alone.shape == (24, 40, 1)
    for channel in range(channels - 1):
        assert np.allclose(found[..., channel], alone[..., 0], rtol=1e-6, atol=0)
    assert np.abs(found[..., -1] - alone[..., 0].astype(float) / 2).max() <= scale


# Lists of transforms


def test_a_crop_in_front_is_carried_out_while_reading():
    given = A.RandomResizedCrop(size=(40, 24), scale=(0.3, 0.7), ratio=(0.5, 1.5))
    augmentation = Augmentation([given, A.HorizontalFlip(p=1)], preprocessing())
    assert augmentation.crop == RandomResizedCrop(40, 24, (0.3, 0.7), (0.5, 1.5))
    assert [type(transform) for transform in augmentation.compose.transforms] == [A.HorizontalFlip]
    picture = DecodedImage(smooth(100, 100))
    seed = np.random.SeedSequence(1)
    assert augmentation.crop is not None
    cut = augmentation.crop(picture, np.random.default_rng(seed))
    expected = preprocessing().fit_to_size(np.ascontiguousarray(cut[:, ::-1]))
    assert np.array_equal(augmentation(picture, seed), expected)


class OwnCrop(A.RandomResizedCrop):
    """Somebody's own."""


@pytest.mark.parametrize(
    "transforms",
    [
        lambda: [A.RandomResizedCrop(size=(32, 32), p=0.5)],
        lambda: [A.RandomResizedCrop(size=(32, 32), interpolation=cv2.INTER_CUBIC)],
        lambda: [A.HorizontalFlip(), A.RandomResizedCrop(size=(32, 32))],
        lambda: [OwnCrop(size=(32, 32))],
        lambda: [A.OneOf([A.RandomResizedCrop(size=(32, 32))], p=1)],
        lambda: [A.RandomCrop(32, 32)],
        list,
    ],
    ids=["sometimes", "cubic", "not in front", "subclass", "inside", "another", "none"],
)
def test_any_other_list_is_left_alone(transforms: Callable[[], list[Any]]):
    given = transforms()
    augmentation = Augmentation(given, preprocessing())
    assert augmentation.crop is None
    assert augmentation.short_side is None
    assert augmentation.compose.transforms == given
    watched = smooth(60, 70)
    found = augmentation(DecodedImage(watched), np.random.SeedSequence(2))
    assert found.shape == (32, 32, 3)


def test_a_picture_kept_smaller_is_large_enough_for_the_smallest_crop(cut):
    for scale, ratio in (((0.25, 1.0), (3 / 4, 4 / 3)), ((0.08, 1.0), (0.5, 1.5)), ((1.0, 1.0), (1.0, 1.0))):
        augmentation = Augmentation([A.RandomResizedCrop(size=(32, 48), scale=scale, ratio=ratio)], preprocessing())
        assert augmentation.crop is not None
        assert augmentation.short_side == math.ceil(48 / min(1, math.sqrt(scale[0] * min(ratio[0], 1 / ratio[1]))))
        for seed in range(100):
            kept = PyramidImage(build_pyramid(np.zeros((900, 900, 3), np.uint8), augmentation.short_side))
            augmentation(kept, np.random.SeedSequence(seed))
            assert cut[-1].shape[0] >= 32
            assert cut[-1].shape[1] >= 48


def test_trivial_augment_is_torchvisions_and_follows_its_seed():
    image = smooth(40, 50)
    transform = A.Compose([TrivialAugment()])
    outcomes = set()
    for seed in range(40):
        transform.set_random_seed(seed)
        found = transform(image=image)["image"]
        assert found.shape == image.shape
        assert found.dtype == np.uint8
        transform.set_random_seed(seed)
        assert np.array_equal(transform(image=image)["image"], found)
        outcomes.add(found.tobytes())
    assert len(outcomes) > 20
    own = TrivialAugment()
    with torch.random.fork_rng():
        torch.manual_seed(99)
        expected = v2.TrivialAugmentWide()(torch.from_numpy(image.transpose(2, 0, 1).copy())).numpy().transpose(1, 2, 0)
    assert np.array_equal(own.apply(image, seed=99), expected)


def test_trivial_augment_knows_colours_of_eight_bits_alone():
    for kind in ({"channels": 1, "mean": [0.0], "std": [1.0]}, {"dtype": "uint16"}, {"dtype": "float32"}):
        with pytest.raises(DataError, match="found TrivialAugment, which knows 3 of uint8 alone"):
            Augmentation([A.OneOf([TrivialAugment()])], preprocessing(**kind))


def as_shares(image: np.ndarray, **_: Any) -> np.ndarray:
    return image / np.float32(255)


def one_plane(image: np.ndarray, **_: Any) -> np.ndarray:
    return image[..., 0]


def one_channel(image: np.ndarray, **_: Any) -> np.ndarray:
    return image[..., :1]


def to_nothing(image: np.ndarray, **_: Any) -> np.ndarray:
    return cv2.resize(image, (0, 0))


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (A.Lambda(image=as_shares), r"expected \(H, W, 3\) of uint8, found \(40, 48, 3\) of float32"),
        (A.Lambda(image=one_plane), r"expected \(H, W, 3\) of uint8, found \(40, 48\) of uint8"),
        (A.Lambda(image=one_channel), r"expected \(H, W, 3\) of uint8, found \(40, 48, 1\) of uint8"),
        (A.RandomCrop(400, 400), "found CropSizeError"),
        (A.Lambda(image=to_nothing), "OpenCV"),
    ],
    ids=["dtype", "dimensions", "channels", "size", "of several lines"],
)
def test_transforms_that_do_not_give_such_images_are_refused_in_one_line(image_folder, transform, said):
    module = folder_module(image_folder({"cat": 6, "dog": 6}), train_transforms=[transform])
    with pytest.raises(DataError, match=said) as caught:
        list(module.train_dataloader())
    line = str(caught.value)
    assert line.startswith("data.train_transforms: expected transforms that fit the images, found ")
    assert ".png (" in line
    assert line.endswith("; change the transforms.")
    assert "\n" not in line


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_crops_no_smaller_than_it_is_told_to(preset):
    record = preprocessing()
    crops = {share: Augmentation(preset, record, smallest_crop=share).crop for share in (None, 0.08, 1.0)}
    assert crops[None].scale == (PRESETS[preset][0], 1.0)
    assert (crops[0.08].scale, crops[1.0].scale) == ((0.08, 1.0), (1.0, 1.0))
    given = [A.RandomResizedCrop(size=(32, 32), scale=(0.3, 0.9))]
    assert Augmentation(given, record, smallest_crop=0.08).crop.scale == (0.3, 0.9)  # a list says everything itself


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_a_crop_that_is_no_share_of_an_image_is_refused(share):
    with pytest.raises(DataError, match=rf"data\.smallest_crop: expected a share .* found {share}"):
        Augmentation("light", preprocessing(), smallest_crop=share)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_keep_images_of_any_kind_what_they_are(preset, channels, dtype):
    low, high = {"uint8": (60, 200), "uint16": (20_000, 50_000), "float32": (-40.0, 1500.0)}[dtype]
    grey = np.repeat(smooth(50, 70)[..., :1] / 255, channels, axis=2)
    image = (low + grey * (high - low)).astype(dtype)
    record = preprocessing(channels=channels, dtype=dtype, mean=[0.0] * channels, std=[1.0] * channels)
    augmentation = Augmentation(preset, record)
    names = {type(transform).__name__ for transform in augmentation.compose.transforms}
    assert "HorizontalFlip" in names
    assert bool(names & {"ColorJitter", "TrivialAugment"}) == ((channels, dtype) == (3, "uint8") and preset != "light")
    found = [augmentation(DecodedImage(image), np.random.SeedSequence(seed)) for seed in range(40)]
    assert all(picture.shape == (32, 32, channels) for picture in found)
    assert all(picture.dtype == dtype for picture in found)
    assert len({picture.tobytes() for picture in found}) > 35  # two may fall on the same crop
    if (channels, dtype) == (3, "uint8"):
        return  # colours change
    for picture in found:
        assert picture.max() <= high * 1.001
        assert picture.std() > 0.08 * (high - low), "an image has lost its values"
        # What is left out is black, or the least value there is.
        assert ((picture >= low * 0.99 if dtype != "float32" else picture >= low - 0.1) | (picture == 0)).all()


def test_values_of_any_size_go_through_transforms_that_expect_shares():
    # albumentations cuts off what lies outside [0, 1] in images of floats.
    rng = np.random.default_rng(0)
    image = (rng.random((32, 32, 1)) * 900 + 250).astype(np.float32)
    record = preprocessing(channels=1, dtype="float32", mean=[0.0], std=[1.0], crop=1.0)
    blurred = Augmentation([A.GaussianBlur(blur_limit=(3, 3), p=1)], record)(
        DecodedImage(image), np.random.SeedSequence(0)
    )
    expected = A.GaussianBlur(blur_limit=(3, 3), p=1)
    shares = A.Compose([expected], seed=0)(image=(image - 250) / 900)["image"] * 900 + 250
    assert blurred.mean() == pytest.approx(image.mean(), rel=0.01)
    assert np.abs(blurred - shares).mean() < 30
    kept = Augmentation([A.VerticalFlip(p=1)], record)
    small = image / 2000
    assert np.array_equal(kept(DecodedImage(small), np.random.SeedSequence(0)), small[::-1])
    flat = np.full((32, 32, 1), 7, np.float32)
    assert np.array_equal(kept(DecodedImage(flat), np.random.SeedSequence(0)), flat)


def test_a_pyramid_shows_the_same_part() -> None:
    image = smooth(900, 1201)
    pyramid = PyramidImage(build_pyramid(image, 500))
    assert (pyramid.height, pyramid.width) == image.shape[:2]
    assert min(pyramid.pixels().shape[:2]) == 500
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
