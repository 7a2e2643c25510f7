"""Data: decoding, geometry, splits, augmentation, class folders, and what depends on the seed alone."""

import io
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2

from datamodules import DataError, ElpvDataModule, ImageFolderDataModule
from datamodules.dataset import UNLABELLED, EpochSampler, ImageDataset, ResumableDataLoader
from datamodules.decode import decode
from datamodules.preprocessing import Preprocessing
from datamodules.splits import stratified_split
from datamodules.table import ImageTable, list_images
from datamodules.transforms import PRESETS, augment, build_augmentation

RECORD: dict[str, Any] = {
    "size": 32,
    "crop": 0.875,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "channels": 3,
}


def smooth(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    """A picture without fine detail, different at every place."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(6 * x / width + phase), np.cos(5 * y / height), np.sin(4 * x / width + 3 * y / height)]
    return np.stack([127 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)


def save(path: Path, phase: float = 0.0, size: tuple[int, int] = (40, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(smooth(*size, phase)).save(path)


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of class folders: ``image_folder({"cat": 5, "train/dog": 3})``; every picture is another."""

    def make(counts: dict[str, int], name: str = "images") -> Path:
        for number, (folder, count) in enumerate(counts.items()):
            (tmp_path / name / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                save(tmp_path / name / folder / f"{i:03d}.png", phase=number + 0.1 * i)
        return tmp_path / name

    return make


def folder_module(root: Path | None, **settings: Any) -> ImageFolderDataModule:
    settings = {"preprocessing": RECORD, "batch_size": 4, "num_workers": 0, **settings}
    return ImageFolderDataModule(root=None if root is None else str(root), **settings)


def attach(module: Any, stage: TrainerFn, world_size: int = 1, rank: int = 0) -> Any:
    """As if a trainer ran the stage with the datamodule."""
    module.trainer = SimpleNamespace(state=SimpleNamespace(fn=stage), world_size=world_size, global_rank=rank)
    return module


def split_of(table: ImageTable) -> dict[str, str]:
    return dict(zip(table.paths, table.splits, strict=True))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# Splits


@pytest.mark.parametrize(
    "fractions",
    [{"train": 0.65, "val": 0.15, "test": 0.2}, {"train": 0.8, "val": 0.2}, {"train": 0.1, "val": 0.3, "test": 0.6}],
)
def test_every_stratum_is_divided_by_the_shares_to_within_one_image(fractions):
    sizes = {"a": 101, "b": 40, "c": 17, "d": 10}
    strata = [name for name, size in sizes.items() for _ in range(size)]
    names = stratified_split(strata, fractions, seed=3)
    assert len(names) == len(strata)
    for stratum, size in sizes.items():
        found = Counter(name for name, s in zip(names, strata, strict=True) if s == stratum)
        assert sum(found.values()) == size
        for split, fraction in fractions.items():
            assert abs(found[split] - fraction * size) <= 1


def test_strata_of_three_images_and_more_reach_every_split():
    for size in range(3, 25):
        names = stratified_split(["a"] * size + ["b"] * 40, {"train": 0.9, "val": 0.05, "test": 0.05}, seed=size)
        assert set(names[:size]) == {"train", "val", "test"}
        assert Counter(names[:size]).most_common(1)[0][0] == "train" or size == 3


def test_a_split_depends_on_its_seed_alone():
    strata = ["a", "b"] * 30
    fractions = {"train": 0.5, "val": 0.25, "test": 0.25}
    first = stratified_split(strata, fractions, seed=0)
    np.random.seed(5)
    assert (stratified_split(strata, fractions, seed=0) == first).all()
    assert (stratified_split(strata, fractions, seed=1) != first).any()
    # Files in order of capture must not end up in one split.
    assert len(set(first[:12:2])) > 1


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


def preprocessing(**changes: Any) -> Preprocessing:
    return Preprocessing.from_dict({**RECORD, **changes})


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


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_decided_by_its_seed(preset):
    compose = build_augmentation(preset, 32)
    image = smooth(50, 70)
    pictures = [augment(compose, image, seed) for seed in range(8)]
    for picture in pictures:
        assert picture.shape == (32, 32, 3)
        assert picture.dtype == np.uint8
    assert len({picture.tobytes() for picture in pictures}) == 8
    # Neither what came before nor the global generators, nor the very pipeline object matter.
    random.seed(1)
    np.random.seed(1)
    other = build_augmentation(preset, 32)
    for seed in (5, 2, 2, 7):
        assert np.array_equal(augment(compose, image, seed), pictures[seed])
        assert np.array_equal(augment(other, image, seed), pictures[seed])


def test_a_list_with_nested_choices_is_decided_by_its_seed():
    def transforms() -> list[Any]:
        choice = A.OneOf([A.GaussNoise(p=1), A.RandomBrightnessContrast(p=1), A.HorizontalFlip(p=1)], p=0.9)
        return [A.RandomCrop(24, 24), A.SomeOf([choice, A.VerticalFlip(p=1)], n=1)]

    image = smooth(40, 48)
    compose, other = build_augmentation(transforms(), 32), build_augmentation(transforms(), 32)
    pictures = [augment(compose, image, seed) for seed in range(6)]
    assert len({picture.tobytes() for picture in pictures}) == 6
    for seed in (4, 0, 5):
        assert np.array_equal(augment(other, image, seed), pictures[seed])


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
        build_augmentation(transforms, 32)


def test_an_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(DataError, match=r"data\.train_transforms: expected light, standard, strong .* 'strnog'"):
        build_augmentation("strnog", 32)


def test_presets_differ_in_strength():
    image = smooth(64, 64)
    plain = preprocessing(crop=1.0).fit_to_size(image).astype(int)
    distance = {
        name: np.mean([np.abs(augment(build_augmentation(name, 32), image, seed) - plain).mean() for seed in range(40)])
        for name in PRESETS
    }
    assert distance["light"] < distance["standard"] < distance["strong"]


# Class folders


def test_undivided_folders_are_divided_alike_for_every_class(image_folder):
    root = image_folder({"cat": 40, "dog/young": 10, "dog/old": 10})
    module = folder_module(root, val_fraction=0.15, test_fraction=0.2)
    assert module.classes == ["cat", "dog"]
    assert module.table.split_is_ours
    counts = {split: dict(module.table.counts(split)) for split in ("train", "val", "test")}
    assert counts == {
        "train": {"cat": 26, "dog": 13},
        "val": {"cat": 6, "dog": 3},
        "test": {"cat": 8, "dog": 4},
    }
    assert sorted(module.table.paths) == list_images(root, root)
    assert {path.split("/")[1] for path in module.table.paths if path.startswith("dog")} == {"young", "old"}
    parts = [set(module.paths(split)) for split in ("train", "val", "test")]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_the_split_follows_split_seed_and_not_seed(image_folder):
    root = image_folder({"cat": 12, "dog": 12})
    first = split_of(folder_module(root).table)
    assert split_of(folder_module(root, seed=1).table) == first
    assert split_of(folder_module(root, split_seed=1).table) != first


def test_given_folders_are_kept(image_folder):
    root = image_folder(
        {f"{split}/{label}": n for split, n in (("train", 3), ("val", 2), ("test", 1)) for label in ("cat", "dog")}
    )
    table = folder_module(root).table
    assert not table.split_is_ours
    assert len(table.paths) == 12
    assert all(path.startswith(f"{split}/") for path, split in split_of(table).items())
    assert split_of(folder_module(root, split_seed=9).table) == split_of(table)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_may_have_any_of_its_usual_names(image_folder, name):
    root = image_folder({"train/cat": 9, "train/dog": 9, f"{name}/cat": 2, f"{name}/dog": 2})
    table = folder_module(root, test_fraction=0.2).table
    by_folder = Counter((path.split("/")[0], split) for path, split in split_of(table).items())
    assert by_folder == {("train", "train"): 14, ("train", "test"): 4, (name, "val"): 4}
    assert table.split_is_ours


def test_folders_of_splits_may_be_named_in_any_case(image_folder):
    root = image_folder({"Train/cat": 4, "Train/dog": 4, "VAL/cat": 1, "VAL/dog": 1, "Test/cat": 2, "Test/dog": 2})
    module = folder_module(root)
    assert module.classes == ["cat", "dog"]
    assert [sum(module.table.counts(split).values()) for split in ("train", "val", "test")] == [8, 2, 4]
    assert not module.table.split_is_ours


def test_evaluation_folders_without_a_training_folder_are_refused(image_folder):
    with pytest.raises(DataError, match=r"data\.root: expected a folder 'train' beside 'val and test'"):
        folder_module(image_folder({"val/cat": 4, "val/dog": 4, "test/cat": 4, "test/dog": 4}))


def test_missing_splits_are_taken_out_of_train(image_folder):
    root = image_folder({"train/cat": 20, "train/dog": 20})
    table = folder_module(root, val_fraction=0.15, test_fraction=0.2).table
    assert table.split_is_ours
    assert {split: dict(table.counts(split)) for split in ("train", "val", "test")} == {
        "train": {"cat": 13, "dog": 13},
        "val": {"cat": 3, "dog": 3},
        "test": {"cat": 4, "dog": 4},
    }


def test_a_split_that_lacks_a_class_keeps_the_indices(image_folder):
    root = image_folder({"train/ant": 2, "train/bee": 2, "train/cow": 2, "val/cow": 3, "test/ant": 1, "test/cow": 2})
    module = folder_module(root)
    assert module.classes == ["ant", "bee", "cow"]
    assert module.dataset("val").targets.tolist() == [2, 2, 2]
    assert module.dataset("test").targets.tolist() == [0, 2, 2]
    (batch,) = module.val_dataloader()
    assert batch["target"].tolist() == [2, 2, 2]


def test_classes_of_a_checkpoint_keep_their_order_and_indices(image_folder):
    root = image_folder({"train/ant": 2, "train/bee": 2, "val/ant": 1, "val/bee": 1, "test/bee": 2})
    module = folder_module(root, classes=["cow", "bee", "ant"])
    assert module.classes == ["cow", "bee", "ant"]
    assert module.dataset("train").targets.tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_unknown_class_in_an_evaluation_split_is_named_with_its_file(image_folder, split):
    root = image_folder({"train/ant": 4, "train/bee": 4, f"{split}/ant": 1, f"{split}/wasp": 1})
    with pytest.raises(DataError) as caught:
        folder_module(root)
    assert f"{split}/wasp/000.png" in str(caught.value)
    assert "'wasp'" in str(caught.value)
    assert "ant, bee" in str(caught.value)


def test_a_class_that_the_checkpoint_does_not_know_is_named_with_its_file(image_folder):
    module = folder_module(image_folder({"ant": 4, "wasp": 4}), classes=["ant", "bee"])
    with pytest.raises(DataError, match=r"wasp/000\.png: expected a class .*ant, bee.* found 'wasp'"):
        module.test_dataloader()


@pytest.mark.parametrize(
    ("counts", "texts"),
    [
        ({"cat": 5, "dog": 0}, ["'dog'", "found none", "remove the folder"]),
        ({"cat": 5, "dog": 2}, ["at least 3 images of class 'dog'", "found 2"]),
        ({"cat": 5}, ["at least 2 classes", "found 1 (cat)"]),
        ({"train/cat": 3, "train/dog": 1, "val/cat": 1, "val/dog": 1}, ["at least 2 images of class 'dog'", "test"]),
        ({"train": 0}, ["a folder for each class"]),
    ],
    ids=["empty class", "too few images", "one class", "too few for the missing split", "no classes"],
)
def test_folders_that_cannot_be_trained_on_are_refused(image_folder, counts, texts):
    root = image_folder(counts)
    with pytest.raises(DataError) as caught:
        folder_module(root)
    for text in [*texts, "data.root"]:
        assert text in str(caught.value)


def test_an_absent_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.root: .*nothing at '.*absent'"):
        folder_module(tmp_path / "absent")
    with pytest.raises(DataError, match=r"give --data\.root"):
        folder_module(None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"val_fraction": 0.0}, r"data\.val_fraction.*found 0\.0"),
        ({"test_fraction": 1.0}, r"data\.test_fraction.*found 1\.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"sum below 1"),
        ({"batch_size": 1}, r"data\.batch_size.*at least 2.*found 1"),
        ({"num_workers": -1}, r"data\.num_workers.*found -1"),
        ({"split_seed": -1}, r"data\.split_seed.*found -1"),
        ({"seed": -1}, r"data\.seed.*found -1"),
        ({"image_size": 16}, r"data\.image_size.*found 16"),
        ({"crop_fraction": 1.5}, r"data\.crop_fraction.*found 1\.5"),
        ({"crop_fraction": 0.0}, r"data\.crop_fraction.*found 0\.0"),
        ({"preprocessing": None}, r"data\.preprocessing.*preprocessing_record"),
        ({"train_transforms": "medium"}, r"data\.train_transforms.*'medium'"),
    ],
)
def test_settings_out_of_range_are_named(image_folder, settings, named):
    with pytest.raises(DataError, match=named):
        folder_module(image_folder({"cat": 6, "dog": 6}), **settings)


def test_image_size_and_crop_fraction_override_the_record(image_folder):
    root = image_folder({"cat": 6, "dog": 6})
    module = folder_module(root, image_size=48, crop_fraction=1.0)
    assert (module.preprocessing.size, module.preprocessing.crop) == (48, 1.0)
    assert next(iter(module.train_dataloader()))["image"].shape[-2:] == (48, 48)
    assert next(iter(module.val_dataloader()))["image"].shape[-2:] == (48, 48)
    assert folder_module(root).preprocessing.to_dict() == RECORD
    assert RECORD["size"] == 32


def test_hidden_files_and_other_files_are_passed_over(image_folder):
    root = image_folder({"cat": 4, "dog": 4})
    (root / "cat" / "notes.txt").write_text("no image")
    shutil.copy(root / "cat" / "000.png", root / "cat" / "._000.png")
    save(root / "cat" / ".thumbnails" / "000.png")
    save(root / ".cache" / "000.png")
    shutil.copy(root / "cat" / "000.png", root / "cat" / "UPPER.PNG")
    module = folder_module(root)
    assert module.classes == ["cat", "dog"]
    assert len(module.table.paths) == 9
    assert "cat/UPPER.PNG" in module.table.paths


def test_a_folder_that_is_named_like_an_image_is_not_one(image_folder):
    root = image_folder({"cat": 4, "dog/cell.png": 4})
    assert len(folder_module(root).table.paths) == 8


# Batches


def test_batches_are_as_documented(image_folder):
    root = image_folder({"cat": 10, "dog": 10})
    module = folder_module(root, batch_size=3)
    for split, loader in (
        ("train", module.train_dataloader()),
        ("val", module.val_dataloader()),
        ("test", module.test_dataloader()),
    ):
        seen: list[int] = []
        for batch in loader:
            assert sorted(batch) == ["image", "index", "target"]
            assert batch["image"].dtype == torch.uint8
            assert batch["image"].shape == (len(batch["index"]), 3, 32, 32)
            assert batch["target"].dtype == batch["index"].dtype == torch.int64
            paths = module.paths(split)
            for index, target in zip(batch["index"].tolist(), batch["target"].tolist(), strict=True):
                assert module.classes[target] == paths[index].split("/")[0]
            seen += batch["index"].tolist()
        images = len(module.paths(split))
        assert len(seen) == len(set(seen)) == (images // 3 * 3 if split == "train" else images)
        assert (seen == sorted(seen)) == (split != "train")


def test_evaluation_images_are_prepared_by_the_one_geometry(image_folder):
    module = folder_module(image_folder({"cat": 10, "dog": 10}), train_transforms="strong")
    for split, loader in (("val", module.val_dataloader()), ("test", module.test_dataloader())):
        for batch in loader:
            for image, index in zip(batch["image"], batch["index"].tolist(), strict=True):
                pixels = decode(module.table.root / module.paths(split)[index])
                expected = module.preprocessing.fit_to_size(pixels)
                assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_an_image_that_already_has_the_networks_size_is_cropped_like_any_other(tmp_path):
    # The served model runs `fit_to_size` on every image: skipping it here would evaluate another model.
    for label in ("cat", "dog"):
        for i in range(4):
            save(tmp_path / label / f"{i}.png", phase=i, size=(32, 32))
    module = folder_module(tmp_path)
    batch = next(iter(module.test_dataloader()))
    pixels = decode(module.table.root / module.paths("test")[0])
    expected = module.preprocessing.fit_to_size(pixels)
    assert not np.array_equal(expected, pixels)
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), expected)


def test_a_training_set_smaller_than_a_batch_is_not_lost(image_folder):
    root = image_folder({"train/cat": 2, "train/dog": 1, "val/cat": 1, "test/cat": 1})
    loader = folder_module(root, batch_size=8).train_dataloader()
    assert len(loader) == 1
    assert [len(batch["index"]) for batch in loader] == [3]


def test_user_transforms_that_keep_the_size_are_fitted_to_the_network(image_folder):
    root = image_folder({"cat": 6, "dog": 6})
    module = folder_module(root, train_transforms=[A.HorizontalFlip(p=1.0)])
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    pixels = decode(module.table.root / module.paths("train")[int(batch["index"][0])])
    flipped = module.preprocessing.fit_to_size(np.ascontiguousarray(pixels[:, ::-1]))
    assert np.abs(batch["image"][0].permute(1, 2, 0).numpy().astype(int) - flipped).max() <= 1


def test_unlabelled_images_are_predicted_without_any_training_data(image_folder):
    folder = image_folder({"": 3, "deeper": 2}, name="unlabelled")
    module = folder_module(None, classes=["cat", "dog"], predict_path=str(folder))
    assert module.paths("predict") == ["000.png", "001.png", "002.png", "deeper/000.png", "deeper/001.png"]
    batches = list(module.predict_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([batch["target"] for batch in batches]).tolist() == [UNLABELLED] * 5
    expected = module.preprocessing.fit_to_size(decode(folder / "deeper" / "001.png"))
    assert np.array_equal(batches[-1]["image"][-1].permute(1, 2, 0).numpy(), expected)


def test_predict_falls_back_to_the_test_split(image_folder):
    module = folder_module(image_folder({"cat": 6, "dog": 6}))
    assert module.paths("predict") == module.paths("test")
    (predicted,), (tested,) = module.predict_dataloader(), module.test_dataloader()
    assert torch.equal(predicted["image"], tested["image"])


def test_a_predict_path_without_images_is_named(tmp_path):
    for path, text in ((tmp_path, "found none"), (tmp_path / "absent", "found nothing")):
        module = folder_module(None, classes=["cat", "dog"], predict_path=str(path))
        with pytest.raises(DataError, match=rf"data\.predict_path: .*{text}"):
            module.predict_dataloader()


# Unreadable files


def test_unreadable_files_of_one_split_are_all_listed(image_folder):
    root = image_folder({"train/cat": 14, "train/dog": 2, "val/cat": 1, "val/dog": 1, "test/cat": 1, "test/dog": 1})
    for i in range(12):
        (root / "train" / "cat" / f"{i:03d}.png").write_bytes(b"" if i % 2 else b"a text")
    with pytest.raises(DataError) as caught:
        attach(folder_module(root), TrainerFn.FITTING).prepare_data()
    message = str(caught.value)
    assert "found 12 that cannot" in message
    assert "and 2 more" in message
    for i in range(10):
        assert f"train/cat/{i:03d}.png (" in message
    assert "001.png (it is empty)" in message
    assert "002.png (it is no image)" in message


def test_a_fit_lists_the_unreadable_files_of_all_splits_together(image_folder):
    root = image_folder({f"{split}/{label}": 2 for split in ("train", "val", "test") for label in ("cat", "dog")})
    bad = ["train/cat/000.png", "val/dog/001.png", "test/cat/001.png"]
    for path in bad:
        (root / path).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        attach(folder_module(root), TrainerFn.FITTING).prepare_data()
    assert [path for path in bad if path not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("stage", "looks_at"),
    [
        (TrainerFn.FITTING, {"train", "val", "test"}),
        (TrainerFn.VALIDATING, {"val"}),
        (TrainerFn.TESTING, {"test"}),
        (TrainerFn.PREDICTING, {"test"}),
    ],
)
def test_a_stage_looks_at_the_images_it_will_read(image_folder, stage, looks_at):
    for split in ("train", "val", "test"):
        root = image_folder(
            {f"{s}/{label}": 1 for s in ("train", "val", "test") for label in ("cat", "dog")}, name=split
        )
        (root / split / "cat" / "000.png").write_bytes(b"")
        module = attach(folder_module(root), stage)
        if split in looks_at:
            with pytest.raises(DataError, match=rf"{split}/cat/000\.png"):
                module.prepare_data()
        else:
            module.prepare_data()


def test_a_file_that_breaks_off_is_named_before_training_and_where_it_is_read(image_folder):
    root = image_folder({"train/cat": 2, "train/dog": 2, "val/cat": 1, "test/cat": 1})
    path = root / "val" / "cat" / "000.png"
    path.write_bytes(path.read_bytes()[:-200])
    module = folder_module(root)
    with pytest.raises(DataError, match=r"val/cat/000\.png \(.*truncated"):
        attach(module, TrainerFn.FITTING).prepare_data()
    with pytest.raises(DataError, match=r"val/cat/000\.png: expected an image that can be read"):
        list(module.val_dataloader())


def test_transforms_that_do_not_fit_the_images_are_named_with_the_file(image_folder):
    root = image_folder({"cat": 6, "dog": 6})
    module = folder_module(root, train_transforms=[A.RandomCrop(400, 400)])
    with pytest.raises(DataError, match=r"data\.train_transforms: .*\.png"):
        list(module.train_dataloader())


class Recorder(LightningModule):
    """Trains one number and remembers which images it saw, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["index"].tolist()))
        return (self.weight * batch["image"].float().mean() / 255 - batch["target"].float().mean()) ** 2

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # As a learning-rate schedule does; it makes Lightning ask for the training loader early.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tiny_trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=folder, **quiet, **settings)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_trainer_refuses_unreadable_files_before_its_first_step(image_folder, tmp_path):
    root = image_folder({"train/cat": 4, "train/dog": 4, "val/cat": 1, "val/dog": 1, "test/cat": 1, "test/dog": 1})
    (root / "test" / "dog" / "000.png").write_bytes(b"")
    module = Recorder()
    with pytest.raises(DataError, match=r"test/dog/000\.png"):
        tiny_trainer(tmp_path, max_steps=1).fit(module, datamodule=folder_module(root))
    assert module.seen == []


# What a sample looks like depends on (seed, epoch, index) alone


def epoch_of(module: ImageFolderDataModule, epoch: int) -> list[dict[str, torch.Tensor]]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def pictures(batches: Iterable[dict[str, torch.Tensor]]) -> dict[int, bytes]:
    found = {}
    for batch in batches:
        for image, index in zip(batch["image"], batch["index"].tolist(), strict=True):
            found[index] = image.numpy().tobytes()
    return found


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """A folder in which all images are the same picture: what differs is the augmentation's doing."""
    for label in ("cat", "dog"):
        for i in range(12):
            save(tmp_path / "twins" / label / f"{i:03d}.png")
    return tmp_path / "twins"


def test_training_images_and_their_order_do_not_depend_on_the_number_of_workers(image_folder):
    root = image_folder({"cat": 12, "dog": 12})
    reference = folder_module(root, seed=7, train_transforms="strong")
    epochs = {epoch: epoch_of(reference, epoch) for epoch in (0, 1)}
    for workers in (1, 2):
        module = folder_module(root, seed=7, train_transforms="strong", num_workers=workers)
        loader = module.train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            random.seed(workers)
            torch.manual_seed(workers)
            batches = list(loader)
            assert len(batches) == len(epochs[epoch]) == 4
            for found, expected in zip(batches, epochs[epoch], strict=True):
                for key in ("index", "target", "image"):
                    assert torch.equal(found[key], expected[key]), (workers, epoch, key)


@pytest.mark.parametrize("replicas", [2, 3])
def test_training_images_do_not_depend_on_the_number_of_ranks(image_folder, replicas):
    root = image_folder({"cat": 12, "dog": 12})
    dataset = folder_module(root, seed=7, train_transforms="strong").dataset("train")
    for epoch in (0, 3):
        alone = EpochSampler(dataset, 1, 0, training=True, seed=7)
        alone.set_epoch(epoch)
        expected = {key: dataset[key]["image"] for key in alone}
        shared = {}
        for rank in range(replicas):
            sampler = EpochSampler(dataset, replicas, rank, training=True, seed=7)
            sampler.set_epoch(epoch)
            shared |= {key: dataset[key]["image"] for key in sampler}
        assert sorted(shared) == sorted(expected)
        assert all(torch.equal(shared[key], image) for key, image in expected.items())


def test_a_rank_reads_its_own_share(image_folder):
    root = image_folder({"cat": 12, "dog": 12})
    whole = pictures(epoch_of(folder_module(root, batch_size=2), 0))
    shares = [
        pictures(epoch_of(attach(folder_module(root, batch_size=2), TrainerFn.FITTING, 2, rank), 0)) for rank in (0, 1)
    ]
    assert len(shares[0]) == len(shares[1]) == len(whole) / 2
    assert not set(shares[0]) & set(shares[1])
    assert shares[0] | shares[1] == whole


def test_fewer_images_than_ranks_are_refused(image_folder):
    root = image_folder({"train/cat": 4, "train/dog": 4, "val/cat": 1, "test/cat": 3})
    module = attach(folder_module(root), TrainerFn.FITTING, world_size=2)
    assert len(module.train_dataloader().sampler) == 4
    with pytest.raises(DataError, match=r"one image of val for each of 2 processes, found 1"):
        module.val_dataloader()


def test_every_epoch_every_seed_and_every_index_look_different(twins):
    def look(seed: int, epoch: int) -> dict[int, bytes]:
        return pictures(epoch_of(folder_module(twins, seed=seed, train_transforms="strong", batch_size=2), epoch))

    first = look(7, 0)
    assert look(7, 0) == first
    assert len(set(first.values())) == len(first), "one picture was augmented alike at two indices"
    for other in (look(7, 1), look(8, 0)):
        assert sorted(other) == sorted(first)
        assert all(other[index] != first[index] for index in first)


def test_the_order_of_training_follows_seed_and_epoch(image_folder):
    root = image_folder({"cat": 12, "dog": 12})

    def order(seed: int, epoch: int) -> list[int]:
        batches = epoch_of(folder_module(root, seed=seed, batch_size=2), epoch)
        return torch.cat([batch["index"] for batch in batches]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sorted(order(0, 0)) == sorted(order(0, 1)) == list(range(len(order(0, 0))))


# The sampler


def numbered(length: int) -> ImageDataset:
    """A dataset of which only the length is asked."""
    paths = [str(i) for i in range(length)]
    return ImageDataset(Path(), paths, [0] * length, preprocessing(), None, seed=0)


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 12, 17])
def test_training_gives_every_rank_equally_many_samples_and_leaves_none_out(length, replicas):
    shares = []
    for rank in range(replicas):
        sampler = EpochSampler(numbered(length), replicas, rank, training=True, seed=0)
        sampler.set_epoch(4)
        share = list(sampler)
        assert len(share) == len(sampler) == -(-length // replicas)
        assert {epoch for epoch, _ in share} == {4}
        shares.append([index for _, index in share])
    counts = Counter(index for share in shares for index in share)
    assert sorted(counts) == list(range(length))
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 12, 17])
def test_evaluation_covers_every_sample_exactly_once(length, replicas):
    seen: list[int] = []
    for rank in range(replicas):
        sampler = EpochSampler(numbered(length), replicas, rank, training=False, seed=0)
        share = [index for _, index in sampler]
        assert len(share) == len(sampler)
        assert share == sorted(share)
        seen += share
    assert sorted(seen) == list(range(length))


# Resuming


def indices(batches: Iterable[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("given", [0, 1, 3, 4])
def test_a_restored_loader_gives_exactly_the_remaining_batches(image_folder, given, workers):
    root = image_folder({"cat": 12, "dog": 12})

    def loader(workers: int) -> ResumableDataLoader:
        made = folder_module(root, num_workers=workers).train_dataloader()
        assert isinstance(made, ResumableDataLoader)
        return made

    reference = loader(0)
    epochs = []
    for epoch in (2, 3):
        reference.sampler.set_epoch(epoch)
        epochs.append(list(reference))
    assert len(epochs[0]) == 4

    stopped = loader(workers)
    stopped.sampler.set_epoch(2)
    running: Iterator[dict[str, torch.Tensor]] = iter(stopped)
    assert indices(next(running) for _ in range(given)) == indices(epochs[0][:given])
    state = stopped.position
    assert state == {"epoch": 2, "batches": given}

    restored = loader(workers)
    restored.go_on_from(state)
    if given < 4:
        restored.sampler.set_epoch(2)
        rest = list(restored)
        assert indices(rest) == indices(epochs[0][given:])
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(rest, epochs[0][given:], strict=True))
        assert restored.position == {"epoch": 2, "batches": 4}
    restored.sampler.set_epoch(3)
    assert indices(restored) == indices(epochs[1])


def test_a_loader_restored_twice_in_one_epoch_counts_from_the_start_of_the_epoch(image_folder):
    root = image_folder({"cat": 12, "dog": 12})
    whole = indices(folder_module(root).train_dataloader())
    loader = folder_module(root).train_dataloader()
    loader.go_on_from({"epoch": 0, "batches": 1})
    running = iter(loader)
    next(running)
    state = loader.position
    assert state == {"epoch": 0, "batches": 2}
    again = folder_module(root).train_dataloader()
    again.go_on_from(state)
    assert indices(again) == whole[2:]


def test_a_restored_position_counts_for_its_own_epoch_and_for_one_pass(image_folder):
    root = image_folder({"cat": 12, "dog": 12})

    def restored(batches: int, epoch: int) -> ResumableDataLoader:
        loader = folder_module(root).train_dataloader()
        loader.go_on_from({"epoch": 2, "batches": batches})
        loader.sampler.set_epoch(epoch)
        return loader

    whole = indices(epoch_of(folder_module(root), 2))
    next_epoch = indices(epoch_of(folder_module(root), 3))
    assert indices(restored(1, epoch=3)) == next_epoch, "batches of another epoch were left out"
    assert indices(restored(len(whole), epoch=2)) == whole, "an epoch that was over became an empty one"
    loader = restored(1, epoch=2)
    assert indices(loader) == whole[1:]
    assert indices(loader) == whole, "the second pass left batches out, too"


def test_the_datamodule_keeps_the_position_in_its_state(image_folder):
    root = image_folder({"cat": 12, "dog": 12})
    whole = indices(folder_module(root).train_dataloader())
    stopped = folder_module(root)
    assert stopped.state_dict() == {"digest": stopped.table.digest, "position": None}
    running = iter(stopped.train_dataloader())
    next(running)
    state = stopped.state_dict()
    assert state == {"digest": stopped.table.digest, "position": {"epoch": 0, "batches": 1}}
    resumed = attach(folder_module(root), TrainerFn.FITTING)
    resumed.load_state_dict(state)
    assert indices(resumed.train_dataloader()) == whole[1:]
    # Only training goes on in the middle; a checkpoint that is tested says nothing about order.
    tested = attach(folder_module(root), TrainerFn.TESTING)
    tested.load_state_dict(state)
    assert indices(tested.train_dataloader()) == whole


def test_a_sampler_leaves_samples_out_of_one_pass_only():
    sampler = EpochSampler(numbered(9), 2, 1, training=True, seed=0)
    whole = list(sampler)
    sampler.skip = 3
    assert list(sampler) == whole[3:]
    assert list(sampler) == whole


class SaveAt(Callback):
    """Saves a checkpoint after a training step, and ends the run as Ctrl-C would."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise StoppedError


class StoppedError(Exception):
    """Stands for Ctrl-C."""


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("step", [1, 3, 4, 5], ids=["first step", "mid-epoch", "last of an epoch", "second epoch"])
def test_a_trainer_resumes_with_exactly_the_remaining_batches(image_folder, tmp_path, step):
    root = image_folder({"cat": 12, "dog": 12})
    whole, first, second = Recorder(), Recorder(), Recorder()
    tiny_trainer(tmp_path, max_epochs=3).fit(whole, datamodule=folder_module(root))
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(StoppedError):
        tiny_trainer(tmp_path, max_epochs=3, callbacks=[SaveAt(step, path)]).fit(first, datamodule=folder_module(root))
    tiny_trainer(tmp_path, max_epochs=3).fit(second, datamodule=folder_module(root), ckpt_path=path, weights_only=True)
    assert [epoch for epoch, _ in whole.seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(first.seen) == step
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.weight, whole.weight)


# The data a checkpoint was trained with


def test_the_digest_stands_for_paths_labels_splits_and_sizes(image_folder):
    root = image_folder({"cat": 6, "dog": 6})
    digest = folder_module(root).table.digest
    assert folder_module(root, seed=3).table.digest == digest
    assert folder_module(root, split_seed=3).table.digest != digest
    table = folder_module(root).table
    relabelled = ImageTable(table.root, table.paths, ["dog", *table.labels[1:]], table.splits, True)
    assert relabelled.digest != digest
    moved = shutil.copytree(root, root.parent / "moved")
    assert folder_module(moved).table.digest == digest, "the same data at another place is the same data"
    path = root / "cat" / "000.png"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    assert folder_module(root).table.digest != digest
    path.write_bytes(content)
    assert folder_module(root).table.digest == digest
    path.rename(path.with_name("renamed.png"))
    assert folder_module(root).table.digest != digest


@pytest.mark.parametrize("stage", [TrainerFn.FITTING, TrainerFn.TESTING, TrainerFn.VALIDATING])
def test_a_checkpoint_of_another_split_is_refused(image_folder, stage):
    root = image_folder({"cat": 8, "dog": 8})
    state = folder_module(root).state_dict()
    attach(folder_module(root, seed=5), stage).load_state_dict(state)
    other = attach(folder_module(root, split_seed=1), stage)
    with pytest.raises(DataError) as caught:
        other.load_state_dict(state)
    assert state["digest"][:12] in str(caught.value)
    assert other.table.digest[:12] in str(caught.value)
    assert "data.split_seed" in str(caught.value)


def test_a_checkpoint_may_be_tested_on_another_test_set_but_not_trained_on_other_data(image_folder):
    counts = {f"{split}/{label}": 2 for split in ("train", "val", "test") for label in ("cat", "dog")}
    state = folder_module(image_folder(counts)).state_dict()
    other = image_folder({**counts, "test/cat": 4}, name="other")
    attach(folder_module(other), TrainerFn.TESTING).load_state_dict(state)
    attach(folder_module(other), TrainerFn.VALIDATING).load_state_dict(state)
    with pytest.raises(DataError, match="digest"):
        attach(folder_module(other), TrainerFn.FITTING).load_state_dict(state)


def test_predicting_a_folder_asks_for_no_training_data(image_folder):
    folder = image_folder({"": 2}, name="unlabelled")
    module = folder_module(None, classes=["cat", "dog"], predict_path=str(folder))
    attach(module, TrainerFn.PREDICTING)
    module.load_state_dict({"digest": "of the training data", "position": None})
    module.prepare_data()


# ELPV


@pytest.fixture
def elpv_root(tmp_path: Path) -> Path:
    """Twenty images of each probability and cell type that the real data set has, without ten thousand pixels."""
    root = tmp_path / "elpv"
    lines = []
    for probability in ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0"):
        for cell_type in ("mono", "poly"):
            for _ in range(20):
                path = f"images/cell{len(lines):04d}.png"
                lines.append(f"{path}  {probability:20s}{cell_type}")
    (root / "images").mkdir(parents=True)
    Image.new("L", (30, 30), 100).save(root / "images" / "cell0000.png")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    for line in lines[1:]:
        shutil.copy(root / "images" / "cell0000.png", root / line.split()[0])
    return root


def elpv_module(root: Path | None, **settings: Any) -> ElpvDataModule:
    where = None if root is None else str(root)
    return ElpvDataModule(root=where, preprocessing=RECORD, num_workers=0, batch_size=4, **settings)


def test_elpv_cells_are_defective_above_one_half(elpv_root):
    module = elpv_module(elpv_root)
    assert module.classes == ["defective", "functional"]
    labels = dict(zip(module.table.paths, module.table.labels, strict=True))
    for line in (elpv_root / "labels.csv").read_text().splitlines():
        path, probability, _ = line.split()
        assert labels[path] == ("defective" if probability in ("0.6666666666666666", "1.0") else "functional")
    listing = elpv_root / "labels.csv"
    listing.write_text(listing.read_text().replace("0.6666666666666666", "0.5               "))
    assert elpv_module(elpv_root).table.labels.count("defective") == 40


def test_elpv_splits_are_balanced_by_label_and_cell_type(elpv_root):
    module = elpv_module(elpv_root, val_fraction=0.15, test_fraction=0.2)
    types = {line.split()[0]: line.split()[2] for line in (elpv_root / "labels.csv").read_text().splitlines()}
    found = Counter((split, label, types[path]) for path, label, split in module.table.named_rows())
    assert found == {
        (split, label, cell_type): count
        for split, count in (("train", 26), ("val", 6), ("test", 8))
        for label in ("defective", "functional")
        for cell_type in ("mono", "poly")
    }
    assert module.table.split_is_ours
    assert split_of(elpv_module(elpv_root, split_seed=1).table) != split_of(module.table)


def test_elpv_images_are_read_as_colour(elpv_root):
    batch = next(iter(elpv_module(elpv_root).val_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert (batch["image"] == 100).all()


def test_elpv_without_its_listing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.root: expected the ELPV file labels\.csv"):
        elpv_module(tmp_path)


def test_elpv_as_installed_has_the_published_counts():
    pytest.importorskip("elpv_dataset")
    module = elpv_module(None)
    assert len(module.table.paths) == 2624
    assert Counter(module.table.labels) == {"functional": 1803, "defective": 821}
    for split, fraction in (("train", 0.65), ("val", 0.15), ("test", 0.2)):
        assert sum(module.table.counts(split).values()) == pytest.approx(2624 * fraction, abs=4)
        assert module.table.counts(split)["defective"] == pytest.approx(821 * fraction, abs=2)
    assert next(iter(module.test_dataloader()))["image"].shape == (4, 3, 32, 32)
