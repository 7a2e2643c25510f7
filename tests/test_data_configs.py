"""Every source of data has a short configuration that trains, and divides as it says."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main
from tests.support import fast, write_images
from tests.test_configs import cells  # noqa: F401 - a fixture

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=8)
    return tmp_path / "images"


def fit(name: str, *arguments: str) -> dict:
    """Train by a source's configuration; the run's summary, with its folder."""
    base = [f"--config={CONFIGS / 'finetune.yaml'}", f"--config={CONFIGS / 'data' / name}.yaml"]
    settings = ["--model.backbone=resnet20", "--model.weights=null", "--trainer.max_epochs=1", "--trainer.logger=false"]
    before = set(Path("runs").glob("2*"))
    common = [argument for argument in fast(Path("unused")) if not argument.startswith("--data.root")]
    assert main(["fit", *base, *common, *settings, *arguments]) == 0
    (folder,) = set(Path("runs").glob("2*")) - before
    return {**json.loads((folder / "summary.json").read_text()), "folder": folder}


def split_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "split.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_manifest(images: Path, **columns: dict[str, str]) -> Path:
    """A table of the images; each column gives a value by file name."""
    paths = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    with Path("images.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", *columns])
        for path in paths:
            writer.writerow([path, path.split("/")[0], *(values[path] for values in columns.values())])
    return Path("images.csv")


def test_image_folder(images: Path) -> None:
    summary = fit("image_folder", f"--data.root={images}", "--data.cache=cache")
    assert summary["classes"] == ["blue", "green", "red"]
    assert any(Path("cache").iterdir())
    again = fit("image_folder", f"--data.root={images}", "--data.cache=cache")
    assert again["metrics"] == summary["metrics"]


def test_a_later_run_divides_as_an_earlier_one(images: Path) -> None:
    first = fit("image_folder", f"--data.root={images}", "--data.split_seed=5")
    second = fit("image_folder", f"--data.root={images}", f"--data.split_file={first['folder'] / 'split.csv'}")
    assert second["tags"]["data_digest"] == first["tags"]["data_digest"]
    assert split_of(second["folder"]) == split_of(first["folder"])
    other = fit("image_folder", f"--data.root={images}")
    assert other["tags"]["data_digest"] != first["tags"]["data_digest"]


def test_manifest(images: Path) -> None:
    groups = {
        path.relative_to(images).as_posix(): f"{path.parent.name}{int(path.stem) // 2}"
        for path in images.rglob("*.png")
    }
    manifest = write_manifest(images, group=groups)
    summary = fit("manifest", f"--data.manifest={manifest}", f"--data.root={images}")
    sides: dict[str, set[str]] = {}
    for row in split_of(summary["folder"]):
        sides.setdefault(row["group"], set()).add(row["split"])
    assert len(sides) == 12
    assert all(len(splits) == 1 for splits in sides.values())


def test_manifest_with_several_classes(images: Path, tmp_path: Path) -> None:
    rows = [("path", "label")]
    for path in sorted(images.rglob("*.png")):
        number = int(path.stem)
        rows.append((path.relative_to(images).as_posix(), path.parent.name + (" | odd" if number % 2 else "")))
    with Path("several.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    summary = fit("manifest", "--data.manifest=several.csv", f"--data.root={images}", "--data.separator=|")
    assert summary["classes"] == ["blue", "green", "odd", "red"]
    assert "test/mean_average_precision" in summary["metrics"]


def test_huggingface(images: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = sorted(images.rglob("*.png"))
    names = sorted({path.parent.name for path in paths})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    content = {"image": [str(path) for path in paths], "label": [path.parent.name for path in paths]}
    datasets.Dataset.from_dict(content, features=features).save_to_disk("saved")
    summary = fit("huggingface", "--data.root=saved")
    assert summary["classes"] == names
    assert len(split_of(summary["folder"])) == 24


def test_streaming(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", f"--data.root={images}", "--data.num_workers=0", "--to=chunks"]) == 0
    assert "24 images in chunks" in capsys.readouterr().out
    folder = fit("image_folder", f"--data.root={images}")
    streamed = fit("streaming", "--data.root=chunks")
    assert streamed["classes"] == folder["classes"]

    def divided(summary: dict) -> set[tuple[str, str]]:
        return {(row["path"], row["split"]) for row in split_of(summary["folder"])}

    assert divided(streamed) == divided(folder)


def test_elpv(cells: Path) -> None:  # noqa: F811
    summary = fit("elpv", f"--data.root={cells}")
    assert summary["classes"] == ["defective", "functional"]


def test_every_source_has_a_short_configuration_that_is_tested_here() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    files = list((CONFIGS / "data").glob("*.yaml"))
    assert len(files) == 5
    for path in files:
        assert path.stem in tested
        assert len(path.read_text().splitlines()) < 25


def test_folds_share_out_all_images(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out: list[str] = []
    for number in (1, 2, 3, 4):
        summary = fit("image_folder", f"--data.root={images}", f"--data.fold={number} of 4")
        held_out += [row["path"] for row in split_of(summary["folder"]) if row["split"] == "test"]
    assert sorted(held_out) == sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    assert "fold 4 of 4" in capsys.readouterr().out


def test_images_of_other_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=8)
    for path in (tmp_path / "images").rglob("*.png"):
        Image.open(path).convert("I").point(lambda value: value * 200).convert("I;16").save(path)
    manifest = write_manifest(tmp_path / "images")
    kind = ["--data.channels=1", "--data.dtype=uint16"]
    summary = fit("manifest", f"--data.manifest={manifest}", f"--data.root={tmp_path / 'images'}", *kind)
    assert summary["classes"] == ["blue", "green", "red"]
