"""What the README says of the networks is what the code counts."""

from pathlib import Path

from pipeline.models.sources import find_source

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_published_addresses_that_are_shown_exist() -> None:
    shown = {word.strip("`") for word in README.split() if word.startswith(("`timm/res", "`torchvision/"))}
    assert {"timm/resnet50.a1_in1k", "torchvision/ResNet50_Weights.IMAGENET1K_V2"} <= {w.rstrip("`,;.") for w in shown}
    for address in shown:
        find_source(address.rstrip("`,;."))
