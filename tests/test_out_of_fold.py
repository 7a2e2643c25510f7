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
    """The same noise for all classes, each picture in several copies whose names begin alike."""
    shutil.rmtree(folder)
    rng = np.random.default_rng(0)
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS // copies):
            # So different from each other that a head could learn them by heart.
            pixels = rng.uniform(0, 255, (1, 1, 3)) + rng.normal(0, 40, (8, 8, 3))
            enlarged = np.kron(pixels, np.ones((5, 5, 1)))
            for copy in range(copies):
                # As if saved anew: not the same bytes.
                image = Image.fromarray(np.clip(enlarged + rng.normal(0, 2, enlarged.shape), 0, 255).astype(np.uint8))
                image.save(folder / name / f"{number:02}-{copy}.png")


def summary_of_newest() -> tuple[Path, dict[str, Any]]:
    folder = max(Path("runs").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
    return folder, json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("turned", [False, True])
def test_what_nothing_tells_is_not_recognised(
    arguments: list[str], turned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, f"--finetuning.turned={turned}"]) == 0
    printed = capsys.readouterr().out
    assert "monitor    none: nothing is held out; training images are judged by heads without them" in printed
    assert "training images are judged in folds, each by" in printed.replace("\n" + " " * 35, " ")
    folder, summary = summary_of_newest()
    images = sum(row.split(",")[2] == "train" for row in (folder / "split.csv").read_text().splitlines())
    assert f"out of fold: {images} images, each judged by a head that was solved without it" in printed
    assert summary["tags"]["monitor"] == "none"
    assert {name.partition("/")[0] for name in summary["metrics"]} == {"out_of_fold", "test"}
    accuracy = summary["metrics"]["out_of_fold/accuracy"]
    assert accuracy["n"] == images
    assert accuracy["value"] < 1 / 3 + 3 * (2 / 9 / images) ** 0.5 < 0.62  # three standard errors above chance
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


@pytest.mark.parametrize("as_weights", [False, True])
def test_a_backbone_that_may_have_seen_the_images_is_not_asked(
    arguments: list[str], as_weights: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    folder, _ = summary_of_newest()
    capsys.readouterr()
    if as_weights:
        arguments = [argument for argument in arguments if not argument.startswith("--model.weights")]
        arguments = [*arguments, f"--model.weights={folder / 'best.ckpt'}"]
    else:
        arguments = [*arguments, f"--ckpt_path={folder / 'best.ckpt'}"]
    assert main([*arguments, "--seed_everything=5"]) == 0
    printed = capsys.readouterr().out
    assert "in folds" not in printed
    assert "heads without them" not in printed
    other, summary = summary_of_newest()
    assert other != folder
    assert {name.partition("/")[0] for name in summary["metrics"]} == {"test"}
    assert "familiarity" not in (other / "predictions.csv").read_text()


def test_heads_judge_one_view_and_say_nothing_of_averages(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--model.test_time_augmentation=flip"]) == 0
    printed = capsys.readouterr().out
    assert "in folds" not in printed
    assert "heads without them" not in printed
    _, summary = summary_of_newest()
    assert {name.partition("/")[0] for name in summary["metrics"]} == {"test"}
    assert summary["temperature"] == 1.0


def test_what_shifts_the_head_shifts_what_is_said_out_of_fold(arguments: list[str], tmp_path: Path) -> None:
    for name in ("blue", "green"):
        for number in range(4, PER_CLASS):
            (tmp_path / "images" / name / f"{number:02}-0.png").unlink()
    found = {}
    for imbalance in ("none", "balanced_sampling"):
        assert main([*arguments, f"--imbalance={imbalance}"]) == 0
        folder, summary = summary_of_newest()
        state = read_checkpoint(folder / "best.ckpt")["state_dict"]
        found[imbalance] = state["network.linear.bias"].softmax(0)[2], summary["metrics"]["out_of_fold/accuracy"]
    # Red ones are the most by far: as often as they come, naming them is right more often than as often as others.
    assert found["none"][0] > found["balanced_sampling"][0]
    assert found["none"][1]["value"] > found["balanced_sampling"][1]["value"]


def test_images_that_cannot_be_read_are_not_judged(arguments: list[str], tmp_path: Path) -> None:
    broken = [tmp_path / "images" / "red" / f"{number:02}-0.png" for number in range(3)]
    for path in broken:
        path.write_bytes(b"no picture")
    assert main([*arguments, "--data.unreadable=skip"]) == 0
    folder, summary = summary_of_newest()
    rows = [row.split(",") for row in (folder / "split.csv").read_text().splitlines()]
    left_out = {f"red/{path.name}" for path in broken}
    trained_on = [row[0] for row in rows if row[2] == "train" and not any(row[0].endswith(name) for name in left_out)]
    assert summary["metrics"]["out_of_fold/accuracy"]["n"] == len(trained_on)
    assert "familiarity" in (folder / "predictions.csv").read_text().splitlines()[0]


def test_images_of_several_classes_are_judged_too(arguments: list[str], tmp_path: Path) -> None:
    rows = [
        (f"{name}/{number:02}-0.png", f"{name}|cold" if number % 2 else name)
        for name in COLOURS
        for number in range(PER_CLASS)
    ]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *(",".join(row) for row in rows)]))
    given = [argument for argument in arguments if not argument.startswith("--data.root")]
    given += ["--data=datamodules.ManifestDataModule", f"--data.manifest={tmp_path / 'table.csv'}"]
    assert main([*given, f"--data.root={tmp_path / 'images'}", "--data.separator=|"]) == 0
    _, summary = summary_of_newest()
    precision = summary["metrics"]["out_of_fold/mean_average_precision"]["value"]
    assert 0.1 < precision < 0.75


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


def test_it_is_said_how_many_are_not_judged(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3, PER_CLASS):  # of the rest one trains
        (tmp_path / "images" / "red" / f"{number:02}-0.png").unlink()
    rows = [f"red/{number:02}-0.png,{'train' if number == 0 else 'test'}" for number in range(3)]
    for name in ("blue", "green"):
        rows += [f"{name}/{number:02}-0.png,{'test' if number == 0 else 'train'}" for number in range(PER_CLASS)]
    (tmp_path / "split.csv").write_text("\n".join(["path,split", *rows]))
    assert main([*arguments, "--data.split_file=split.csv"]) == 0
    printed = capsys.readouterr().out
    assert "out of fold: 22 images" in printed
    assert "(1 more train, and are not judged)" in printed
