"""What a person sees: a bar on a terminal, plain lines elsewhere."""

import sys
from pathlib import Path

import pytest

from pipeline.cli import main
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
