"""Whether pictures may be turned is asked of a probe, and presets turn them so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from datamodules.decode import DecodedImage
from datamodules.preprocessing import Preprocessing
from datamodules.transforms import ORIENTATIONS, PRESETS, Augmentation, turns
from pipeline.models.backbones import create_backbone
from pipeline.planning import planner
from pipeline.planning.orientation import TURNS, Recognised, try_turns
from tests.support import fast


def arrows(rng: np.random.Generator, count: int, kinds: list[Callable[[NDArray], NDArray]]) -> tuple[NDArray, NDArray]:
    """Noisy pictures of one stroke, turned in each of the ways; each way is a class."""
    stroke = np.zeros((8, 8), np.float32)
    stroke[1, 1:6] = stroke[1:4, 1] = 1  # an L: no turn of it is itself
    targets = np.arange(count) % len(kinds)
    pictures = np.stack([kinds[target](stroke) for target in targets]) + rng.normal(0, 0.2, (count, 8, 8))
    return pictures.astype(np.float32), targets


def under_turns(pictures: NDArray) -> dict:
    images = torch.from_numpy(pictures)[:, None]
    flat = {None: images} | {turn: apply(images) for turn, (_, apply) in TURNS.items()}
    return {turn: turned.flatten(1).contiguous().numpy() for turn, turned in flat.items()}


@pytest.mark.parametrize(
    ("kinds", "allowed"),
    [
        # Classes differ in what a turn changes: left and right; up and down; lying and standing.
        ([lambda x: x, np.fliplr], "upright"),
        ([lambda x: x + np.fliplr(x), lambda x: np.flipud(x + np.fliplr(x))], "mirrored"),
        (
            [
                lambda x: x + x[::-1] + x[:, ::-1] + x[::-1, ::-1],
                lambda x: (x + x[::-1] + x[:, ::-1] + x[::-1, ::-1]).T,
            ],
            "flipped",
        ),
        # A spot in the middle against none.
        ([lambda x: x * 0, lambda x: np.pad(np.ones((2, 2)), 3)], "any"),
    ],
)
def test_what_tells_classes_apart_must_not_be_turned(kinds: list, allowed: str) -> None:
    pictures, targets = arrows(np.random.default_rng(0), 120, kinds)
    found = try_turns(under_turns(pictures), targets, 2, None, seed=0)
    assert found is not None
    assert found.upright > 0.95
    assert found.orientation == allowed


def test_too_few_pictures_say_nothing() -> None:
    pictures, targets = arrows(np.random.default_rng(0), 2, [lambda x: x, np.fliplr])
    assert try_turns(under_turns(pictures), targets, 2, None, seed=0) is None


def test_a_loss_within_the_error_of_a_few_pictures_is_no_reason() -> None:
    shares = {"upright": 0.80, "turned": {"mirrored": 0.70, "flipped": 0.80, "any": 0.3}, "images": 20, "chance": 0.5}
    assert Recognised(**shares, errors={"mirrored": 0.09, "flipped": 0.04, "any": 0.1}).orientation == "flipped"
    assert Recognised(**shares, errors={"mirrored": 0.02, "flipped": 0.02, "any": 0.1}).orientation == "upright"


def test_what_photographs_do_not_have_anyway_needs_pictures_enough_to_tell() -> None:
    shares = {"upright": 0.80, "turned": {"mirrored": 0.80, "flipped": 0.80, "any": 0.80}, "images": 34, "chance": 0.5}
    assert Recognised(**shares, errors={"mirrored": 0.09, "flipped": 0.09, "any": 0.09}).orientation == "mirrored"
    assert Recognised(**shares, errors={"mirrored": 0.04, "flipped": 0.04, "any": 0.04}).orientation == "any"


def test_a_probe_that_recognises_hardly_more_than_chance_allows_nothing_that_photographs_do_not_have() -> None:
    def found(upright: float, chance: float, turned: float) -> Recognised:
        shares, errors = dict.fromkeys(TURNS, turned), dict.fromkeys(TURNS, 0.01)
        return Recognised(upright, shares, errors, images=400, chance=chance)

    for blind in (found(0.02, 0.005, 0.0), found(0.93, 0.91, 0.91)):
        assert blind.orientation == "mirrored"
        assert "too little beyond the" in blind.in_words()
    assert found(0.78, 0.69, 0.77).orientation == "any"
    assert "too little" not in found(0.78, 0.69, 0.77).in_words()
    assert found(0.93, 0.91, 0.5).orientation == "upright"


def test_a_turn_must_not_cost_much_of_the_little_that_is_recognised() -> None:
    def allowed(turned: float, upright: float = 0.08) -> str:
        shares = {"mirrored": upright, "flipped": turned, "any": turned}
        return Recognised(upright, shares, dict.fromkeys(TURNS, 0.003), images=2_000, chance=0.005).orientation

    assert allowed(0.045) == "mirrored"  # half of it would be lost, if only 3.5 in a hundred pictures
    assert allowed(0.07) == "any"
    assert allowed(0.77, upright=0.8) == "any"


def test_very_many_classes_of_which_little_is_recognised_stay_as_photographs_are() -> None:
    rng = np.random.default_rng(0)
    features = {turn: rng.normal(size=(100, 8)).astype(np.float32) for turn in (None, *TURNS)}
    found = try_turns(features, np.arange(100) % 80, 80, None, seed=0)
    assert found is not None
    assert found.upright < 0.08
    assert found.chance == 2 / 100
    assert found.orientation == "mirrored"


def pictures_of(orientation: str, preset: str, image: NDArray) -> set[bytes]:
    record = Preprocessing(8, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3, 3)
    augmentation = Augmentation(preset, record, orientation=orientation)
    augmentation.crop = None  # the turn alone
    augmentation.compose.transforms = augmentation.compose.transforms[: len(ORIENTATIONS[orientation]())]
    return {augmentation(DecodedImage(image), np.random.SeedSequence(seed)).tobytes() for seed in range(100)}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("orientation", "count"), [("upright", 1), ("mirrored", 2), ("flipped", 4), ("any", 8)])
def test_presets_turn_pictures_as_far_as_is_allowed(preset: str, orientation: str, count: int) -> None:
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    assert len(pictures_of(orientation, preset, image)) == count


@pytest.mark.parametrize(("orientation", "count"), [("upright", 0), ("mirrored", 1), ("flipped", 3), ("any", 7)])
def test_turns_are_what_training_makes_of_a_picture(orientation: str, count: int) -> None:
    picture = np.arange(16).reshape(4, 4)
    made = [turn(torch.from_numpy(picture)[None, None])[0, 0].numpy() for turn in turns(orientation).values()]
    allowed = {
        "upright": [],
        "mirrored": [np.fliplr(picture)],
        "flipped": [np.fliplr(picture), np.flipud(picture), np.rot90(picture, 2)],
        "any": [np.rot90(side, quarters) for side in (picture, picture.T) for quarters in range(4)],
    }[orientation]
    expected = {each.tobytes() for each in map(np.ascontiguousarray, allowed)} - {picture.tobytes()}
    assert {np.ascontiguousarray(each).tobytes() for each in made} == expected
    assert len(made) == count


def test_a_plan_finds_out_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(1)
    save_file(create_backbone("resnet20", 10).state_dict(), tmp_path / "weights.safetensors")
    rng = np.random.default_rng(0)
    for name, where in (("bottom", slice(20, 40)), ("top", slice(0, 20))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 90, (40, 40, 3), np.uint8)
            pixels[where] += 150  # bright above or below; the same in the mirror
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    arguments = [
        *fast(tmp_path / "images"),
        "--model.backbone=resnet20",
        f"--model.weights={tmp_path}/weights.safetensors",
    ]
    assert main(["plan", *arguments, "--to=plan.yaml"]) == 0
    assert "orientation: mirrored # a probe recognises" in (tmp_path / "plan.yaml").read_text()
    # The trial's heads tell spreads stage by stage where the head that is asked for sees several.
    told: list[Any] = []
    monkeypatch.setattr(planner, "try_turns", lambda *given: (told.append(given[-1]), try_turns(*given))[1])
    for stages, widths in ((3, [16, 32, 64]), (1, [64])):
        assert main(["plan", *arguments, f"--model.head_stages={stages}"]) == 0
        assert told.pop() == widths
