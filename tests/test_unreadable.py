"""Whole runs over folders with bad files: refused all at once, or left out and told."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from mlflow import MlflowClient

from datamodules import DataError
from pipeline.cli import main
from tests.bad_files import REFUSED, odd_but_sound
from tests.images import attach, folder_module, save
from tests.support import fast, write_images

ODD_NAMES = ["line\nend.png", 'quote\'s "and" comma, tab\t.png', "tête-à-tête 日本.png", "-rf.png", "%s{0}$HOME.png"]


@pytest.fixture
def divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``train``, ``val`` and ``test`` of three classes."""
    monkeypatch.chdir(tmp_path)
    for number, (split, count) in enumerate((("train", 8), ("val", 3), ("test", 4))):
        write_images(tmp_path / "images" / split, count, seed=number)
    return tmp_path / "images"


def fit(root: Path, *arguments: str) -> int:
    return main(["fit", *fast(root), "--model.backbone=resnet20", "--trainer.max_epochs=2", *arguments])


def run_folder() -> Path:
    (folder,) = Path("runs").iterdir()
    return folder


def predictions(path: Path) -> dict[str, list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return {row[0]: row[1:] for row in rows[1:]}


def test_every_kind_of_bad_file_is_named_before_training(divided, capfd):
    # Named by themselves they would fill pages: each has its turn in a test of its own.
    bad = {name: content for name, (content, _) in REFUSED.items() if not name.startswith("many")}
    for name, content in bad.items():
        (divided / "train" / "red" / name).write_bytes(content)
    assert fit(divided) == 2
    shown = capfd.readouterr()
    line = [line for line in shown.err.splitlines() if not line.startswith("TIFF")]  # what libtiff says by itself
    assert len(line) == 1
    assert f"error: data: expected {45 + len(bad)} images that can be read, found {len(bad)} that cannot: " in line[0]
    assert line[0].count("train/red/") == 10
    assert f"and {len(bad) - 10} more; repair or remove them, or leave them out by data.unreadable skip." in line[0]
    assert not Path("runs").exists()


def test_bad_files_that_are_left_out_change_nothing_for_the_others(divided, capsys):
    assert fit(divided) == 0
    folder = run_folder()
    clean, clean_summary = predictions(folder / "predictions.csv"), json.loads((folder / "summary.json").read_text())
    assert "skipped" not in capsys.readouterr().out
    weights = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    shutil.rmtree("runs")
    bad = {"train/red/002a.png": "nothing.jpg", "val/blue/000a.gif": "page.jpg", "test/green/9.jpg": "text.jpg"}
    for place, name in bad.items():
        (divided / place).write_bytes(REFUSED[name][0])
    assert fit(divided, "--data.unreadable=skip", "--data.num_workers=1") == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "skipped" in line]
    root = divided.resolve()
    assert line == (
        f"skipped    3 images that cannot be read: {root}/train/red/002a.png (it is empty), "
        f"{root}/val/blue/000a.gif (it is a web page), {root}/test/green/9.jpg (it is no image)"
    )
    assert shown.index(line) < shown.index("epoch   1/2")
    folder = run_folder()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["skipped"] == {"train": 1, "val": 1, "test": 1}
    assert clean_summary["skipped"] == {"train": 0, "val": 0, "test": 0}
    assert summary["metrics"] == clean_summary["metrics"]
    assert predictions(folder / "predictions.csv") == clean
    again = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    client = MlflowClient(summary["tracking_uri"], summary["tracking_uri"])
    assert client.get_run(summary["run_id"]).data.tags["skipped_images"] == "3"
    assert client.get_run(clean_summary["run_id"]).data.tags["skipped_images"] == "0"


def test_bad_files_are_left_out_of_evaluation_and_prediction(divided, capsys):
    assert fit(divided, "--trainer.logger=false") == 0
    checkpoint, tested = f"--ckpt_path={run_folder()}", predictions(run_folder() / "predictions.csv")
    (divided / "test" / "red" / "1.jpg").write_bytes(b"")
    capsys.readouterr()
    for subcommand in (["test"], ["predict", f"--data.predict_path={divided / 'test'}"]):
        arguments = [*subcommand, f"--data.root={divided}", checkpoint, "--data.num_workers=0"]
        assert main([*arguments, "--output=none.csv"]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: data: expected 13 images that can be read, found 1 that cannot: ")
        assert not Path("none.csv").exists()
        output = Path(f"{subcommand[0]}.csv")
        assert main([*arguments, f"--output={output}", "--data.unreadable=skip"]) == 0
        shown = capsys.readouterr()
        assert "skipped    1 image that cannot be read: " in shown.out
        assert "test/red/1.jpg (it is empty)" in shown.out
        found = predictions(output)
        assert [name.removeprefix("test/") for name in found] == [name.removeprefix("test/") for name in tested]
        for name, row in tested.items():
            own = found[name if subcommand == ["test"] else name.removeprefix("test/")]
            assert own[-4:] == row[-4:]


def test_odd_files_and_odd_names_go_through_a_whole_run(divided, capsys):
    for name, content, _ in odd_but_sound():
        (divided / "train" / "blue" / name).write_bytes(content)
    for name in ODD_NAMES:
        save(divided / "test" / "blue" / name)
    (divided / "test" / "blue" / "broken\n.png").write_bytes(b"")
    assert fit(divided) == 2
    assert "test/blue/broken\\n.png (it is empty)" in capsys.readouterr().err
    assert fit(divided, "--data.unreadable=skip", "--data.num_workers=1") == 0
    found = predictions(run_folder() / "predictions.csv")
    assert {f"test/blue/{name}" for name in ODD_NAMES} < set(found)
    with (run_folder() / "split.csv").open(newline="", encoding="utf-8") as file:
        assert {f"test/blue/{name}" for name in ODD_NAMES} < {row["path"] for row in csv.DictReader(file)}


def test_a_class_of_which_nothing_can_be_read_is_an_error(divided, capsys):
    for path in (divided / "train" / "red").iterdir():
        path.write_bytes(b"")
    assert fit(divided, "--data.unreadable=skip") == 2
    assert "expected images of every class in train that can be read, found none of red" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_names_that_are_no_text_are_refused_and_shown(divided, capsys):
    with open(os.fsencode(divided) + b"/train/red/caf\xe9.png", "wb") as file:
        file.write((divided / "train" / "red" / "000.png").read_bytes())
    assert fit(divided) == 2
    assert "expected names of files in UTF-8, found '" in (line := capsys.readouterr().err)
    assert "train/red/caf\\udce9.png'; rename it" in line


def dangling(folder: Path) -> None:
    (folder / "x.jpg").symlink_to("nowhere.jpg")


def circle(folder: Path) -> None:
    (folder / "x.jpg").symlink_to("x.jpg")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "x.jpg")


def device(folder: Path) -> None:
    (folder / "x.jpg").symlink_to("/dev/zero")


def outside(folder: Path) -> None:
    save(folder.parents[2] / "outside.png")
    (folder / "x.jpg").symlink_to(folder.parents[2] / "outside.png")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (dangling, "nothing at '"),
        (circle, "nothing at '"),
        (pipe, "x.jpg', which is no regular file"),
        (device, "x.jpg', which leads out of it"),
        (outside, "x.jpg', which leads out of it"),
    ],
)
def test_what_is_no_file_of_the_folder_is_refused_by_a_run(divided, capsys, make: Callable[[Path], None], said):
    make(divided / "train" / "red")
    for unreadable in ("error", "skip"):
        assert fit(divided, f"--data.unreadable={unreadable}") == 2
        assert said in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("make", [dangling, circle, pipe, device])
def test_what_is_no_file_is_named_or_left_out_of_a_prediction(tmp_path, make: Callable[[Path], None]):
    save(tmp_path / "a" / "b" / "c" / "fine.png")
    make(tmp_path / "a" / "b" / "c")
    settings = {"classes": ["cat", "dog"], "predict_path": str(tmp_path / "a")}
    with pytest.raises(DataError, match=r"found 1 that cannot: .*b/c/x\.jpg \("):
        attach(folder_module(None, **settings), TrainerFn.PREDICTING).prepare_data()
    module = attach(folder_module(None, **settings, unreadable="skip"), TrainerFn.PREDICTING)
    module.prepare_data()
    assert module.images("predict").paths == ["b/c/fine.png"]
    assert len(list(module.predict_dataloader())) == 1


def test_a_folder_that_is_called_an_image_is_a_folder(image_folder):
    root = image_folder({"cat": 4, "dog/x.jpg": 4})
    module = folder_module(root)
    assert module.classes == ["cat", "dog"]
    assert len(module.table.paths) == 8


def test_a_reader_survives_every_bad_file_and_names_it(image_folder):
    # What breaks after the trial, or where there was none, must not take the reading process with it.
    root = image_folder({f"{split}/{name}": 2 for split in ("train", "val", "test") for name in ("cat", "dog")})
    victim = root / "val" / "cat" / "000.png"
    for name in ("nothing.jpg", "text bomb.png", "many scans.jpg"):
        content, said = REFUSED[name]
        victim.write_bytes(content)
        with pytest.raises(DataError, match=rf"val/cat/000\.png: expected an image that can be read, found .*({said})"):
            list(folder_module(root, num_workers=1).val_dataloader())
