"""What a person sees: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.progress import Meter
from tests.support import fast, write_images


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=6)
    return ["fit", *fast(tmp_path / "images"), "--trainer.max_epochs=2", "--trainer.logger=false"]


def test_plain_lines_where_nobody_looks(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert [line.split()[:2] for line in shown.out.splitlines() if line.startswith("epoch")] == [
        ["epoch", "1/2"],
        ["epoch", "2/2"],
    ]
    assert "%|" not in shown.out + shown.err
    assert shown.err == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_a_bar_on_a_terminal_unless_quiet(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([*arguments, *(["--quiet"] if quiet else [])]) == 0
    shown = capsys.readouterr()
    assert ("%|" in shown.out + shown.err) is not quiet
    assert "epoch   2/2  train/loss" in shown.out


def test_a_bar_for_images_goes_on_and_another_starts_at_its_own_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter(shown=True)
    for done in (1, 50, 99):
        time.sleep(0.15)  # more often it is not drawn
        meter("features", done, 100)
    meter("features", 100, 100)
    meter("trying train", 10, 20)
    shown = [" ".join(drawn.split("|")[0].split()) for drawn in capsys.readouterr().out.split("\r")]
    drawn = [bar for bar in shown if "%" in bar]
    assert drawn[0] == "features: 0%"
    assert drawn.count("features: 0%") == 1
    assert drawn[-2] == "features: 99%"
    assert drawn[-1].startswith("trying train: ")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_loss_in_the_bar_is_that_of_the_last_step(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], accumulated: int
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    # An epoch of one batch, whose loss is the epoch's.
    chosen = ["--data.batch_size=64", "--trainer.max_epochs=1", f"--trainer.accumulate_grad_batches={accumulated}"]
    assert main([*arguments, *chosen]) == 0
    shown = "".join(capsys.readouterr())
    of_epoch = float(shown.split("train/loss ")[1].split()[0])
    assert float(shown.rsplit("loss=", 1)[1].split("]")[0]) == pytest.approx(of_epoch, abs=0.01)


def test_the_lower_loss_is_the_better_one(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--monitor=val/loss"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    losses = [float(line.split("val/loss ")[1].split()[0]) for line in lines]
    assert lines[0].endswith("best val/loss")
    assert lines[1].endswith("best val/loss") is (losses[1] < losses[0])


def test_epochs_without_a_validation_have_their_line_too(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--trainer.check_val_every_n_epoch=2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert "val/accuracy" not in lines[0]
    assert "val/accuracy" in lines[1]
