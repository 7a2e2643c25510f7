"""Where a head is solved on all images, it is validated by folds: honest figures, and a temperature, of tiny sets."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.checkpoints import CALIBRATED, TEMPERATURE, read_checkpoint
from pipeline.cli import main
from tests.support import COLOURS, fast, pretrained

PER_CLASS = 12


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a head on pictures whose class nothing tells."""
    monkeypatch.chdir(tmp_path)
    found = [*fast(tmp_path / "images"), *pretrained(tmp_path, PER_CLASS)]
    found = [argument for argument in found if "val_fraction" not in argument]
    write_noise(tmp_path / "images", copies=1)
    return ["fit", *found, "--finetuning=LinearProbe", "--finetuning.features=features", "--trainer.logger=false"]


def write_noise(folder: Path, copies: int) -> None:
    """The same noise for all classes, each picture under several names that begin alike."""
    shutil.rmtree(folder)
    rng = np.random.default_rng(0)
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS // copies):
            # So different from each other that a head could learn them by heart.
            pixels = rng.uniform(0, 255, (1, 1, 3)) + rng.normal(0, 40, (8, 8, 3))
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize((40, 40))
            for copy in range(copies):
                image.save(folder / name / f"{number:02}-{copy}.png")


def summary_of_newest() -> tuple[Path, dict[str, Any]]:
    folder = max(Path("runs").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
    return folder, json.loads((folder / "summary.json").read_text())


def test_what_nothing_tells_is_not_recognised(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "monitor    none: nothing is held out; training images are judged in folds" in printed
    assert "all are judged in folds" in printed.replace("\n" + " " * 35, " ")
    folder, summary = summary_of_newest()
    images = sum(row.split(",")[2] == "train" for row in (folder / "split.csv").read_text().splitlines())
    assert f"out of fold: {images} images, each judged by a head that was solved without it" in printed
    assert {name.partition("/")[0] for name in summary["metrics"]} == {"out_of_fold", "test"}
    accuracy = summary["metrics"]["out_of_fold/accuracy"]
    assert accuracy["n"] == images
    assert accuracy["value"] < 0.6 < 1 / 3 + 3 * (2 / 9 / images) ** 0.5 + 0.1  # three standard errors above chance
    assert summary["metrics"]["out_of_fold/log_loss"]["value"] > 0.9


@pytest.mark.parametrize("turned", [False, True])
def test_copies_are_held_out_together(arguments: list[str], tmp_path: Path, turned: bool) -> None:
    write_noise(tmp_path / "images", copies=3)
    arguments = [*arguments, f"--finetuning.turned={turned}"]
    assert main([*arguments]) == 0
    apart = summary_of_newest()[1]["metrics"]["out_of_fold/accuracy"]["value"]
    assert main([*arguments, "--data.group_pattern=([a-z]+/[0-9]+)-"]) == 0
    grouped = summary_of_newest()[1]["metrics"]["out_of_fold/accuracy"]["value"]
    assert grouped < 1 / 3 < 0.5 < apart


def test_the_temperature_is_fitted_by_it(arguments: list[str]) -> None:
    assert main(arguments) == 0
    folder, summary = summary_of_newest()
    content = read_checkpoint(folder / "best.ckpt")
    assert content[CALIBRATED]
    assert summary["temperature"] == round(float(content["state_dict"][TEMPERATURE]), 4) != 1.0


def test_the_same_run_says_the_same(arguments: list[str]) -> None:
    said = []
    for seed in (0, 0, 1):
        assert main([*arguments, f"--seed_everything={seed}"]) == 0
        said.append(summary_of_newest()[1]["metrics"]["out_of_fold/log_loss"])
    assert said[0] == said[1] != said[2]


def test_a_run_that_begins_from_another_ones_head_has_not_solved_it(arguments: list[str]) -> None:
    assert main(arguments) == 0
    folder, _ = summary_of_newest()
    assert main([*arguments, f"--ckpt_path={folder / 'best.ckpt'}", "--seed_everything=5"]) == 0
    other, summary = summary_of_newest()
    assert other != folder
    assert {name.partition("/")[0] for name in summary["metrics"]} == {"test"}


def test_heads_judge_one_view_and_say_nothing_of_averages(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--model.test_time_augmentation=flip"]) == 0
    assert "in folds" not in capsys.readouterr().out
    _, summary = summary_of_newest()
    assert {name.partition("/")[0] for name in summary["metrics"]} == {"test"}
    assert summary["temperature"] == 1.0


def test_rare_classes_shift_what_heads_say_as_they_shift_the_head(arguments: list[str], tmp_path: Path) -> None:
    for name in ("blue", "green"):
        for number in range(4, PER_CLASS):
            (tmp_path / "images" / name / f"{number:02}-0.png").unlink()
    assert main(arguments) == 0
    plain = summary_of_newest()[1]["metrics"]["out_of_fold/macro_f1"]["value"]
    assert main([*arguments, "--imbalance=balanced_sampling"]) == 0
    assert summary_of_newest()[1]["metrics"]["out_of_fold/macro_f1"]["value"] != plain


def test_images_held_out_validate_as_before(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--data.val_fraction=0.2"]) == 0
    assert "out of fold" not in capsys.readouterr().out
    _, summary = summary_of_newest()
    assert {name.partition("/")[0] for name in summary["metrics"]} == {"val", "test"}


def test_one_image_of_each_class_leaves_none_to_hold_out(arguments: list[str], tmp_path: Path) -> None:
    for name in COLOURS:
        for number in range(2, PER_CLASS):
            (tmp_path / "images" / name / f"{number:02}-0.png").unlink()
    write_split(tmp_path)
    assert main([*arguments, "--data.split_file=split.csv"]) == 0
    _, summary = summary_of_newest()
    assert summary["temperature"] == 1.0
    assert {name.partition("/")[0] for name in summary["metrics"]} == {"test"}


def write_split(folder: Path) -> None:
    """One image of each class trains, one tests."""
    rows = [f"{name}/{number:02}-0.png,{split}" for name in COLOURS for number, split in enumerate(("train", "test"))]
    (folder / "split.csv").write_text("\n".join(["path,split", *rows]))
