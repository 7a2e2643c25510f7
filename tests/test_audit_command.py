"""``python -m pipeline audit`` from the command line to its page."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.cli import main
from pipeline.models import backbones
from tests.support import write_images

FOUND = 3


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Divided images, none of them in two splits."""
    monkeypatch.chdir(tmp_path)
    for number, split in enumerate(("train", "val", "test")):
        write_images(tmp_path / "images" / split, per_class=8, seed=number, size=64)
    return tmp_path / "images"


def audit(images: Path, *arguments: str) -> int:
    settings = ["--model.backbone=resnet20", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    return main(["audit", f"--data.root={images}", *settings, *arguments])


def report(folder: str = "audit") -> dict:
    return json.loads((Path(folder) / "audit.json").read_text())


def test_clean_data_passes(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(images, "--strict") == 0
    shown = capsys.readouterr().out
    assert "72 images in" in shown
    assert "labels      not judged, and copies compared by their pixels alone: model.weights is not set" in shown
    assert report()["passed"]
    assert (Path("audit") / "audit.html").read_text().startswith("<!")
    assert not Path("runs").exists()


def test_a_leak_is_found_and_ends_a_strict_audit_with_three(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "test" / "red" / "000.png").write_bytes((images / "train" / "red" / "003.png").read_bytes())
    assert audit(images, "--to=elsewhere") == 0
    assert "1 picture is in more than one split" in capsys.readouterr().out
    assert audit(images, "--to=elsewhere", "--strict") == FOUND
    found = report("elsewhere")
    assert not found["passed"]
    (leak,) = (cluster for cluster in found["duplicates"] if cluster["leaks"])
    assert {image["path"] for image in leak["images"]} == {"test/red/000.png", "train/red/003.png"}
    with (Path("elsewhere") / "audit_groups.csv").open(newline="") as file:
        group_of = {row["path"]: row["group"] for row in csv.DictReader(file)}
    assert group_of["test/red/000.png"] == group_of["train/red/003.png"]


def test_unreadable_files_end_a_strict_audit_with_three(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "train" / "red" / "000.png").write_bytes(b"<html>not found</html>")
    assert audit(images) == 0
    assert audit(images, "--strict") == FOUND
    (unreadable,) = report()["unreadable"]
    assert unreadable["path"] == "train/red/000.png"
    assert "web page" in unreadable["problem"]


def test_with_weights_labels_are_judged_and_features_are_kept(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    save_file(backbones.create_backbone("resnet20", 10).state_dict(), "weights.safetensors")
    (images / "train" / "red" / "000.png").rename(images / "train" / "blue" / "wrong.png")
    assert audit(images, "--model.weights=weights.safetensors") == 0
    assert "not judged" not in capsys.readouterr().out
    assert report()["suspects"][0]["path"] == "train/blue/wrong.png"
    assert report()["suspects"][0]["suggested"] == ["red"]

    def looks(*_: object) -> None:
        raise AssertionError("features were computed")

    monkeypatch.setattr(backbones, "features", looks)
    assert audit(images, "--model.weights=weights.safetensors") == 0
