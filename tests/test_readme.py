"""What the README says of the networks is what the code counts."""

from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.models.sources import find_source

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_the_family_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") > 30
    _, _, after = README.partition("<!-- printed by: python -m pipeline backbones -->\n")
    assert after.startswith(printed)


def test_the_published_addresses_that_are_shown_exist() -> None:
    shown = {word.strip("`") for word in README.split() if word.startswith(("`timm/res", "`torchvision/"))}
    assert {"timm/resnet50.a1_in1k", "torchvision/ResNet50_Weights.IMAGENET1K_V2"} <= {w.rstrip("`,;.") for w in shown}
    for address in shown:
        find_source(address.rstrip("`,;."))
