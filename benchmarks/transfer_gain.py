"""What pretrained weights are worth: the same run with and without them, on the same test images.

    python benchmarks/transfer_gain.py elpv     # configs/elpv_lite0.yaml against configs/quickstart.yaml, from scratch
    python benchmarks/transfer_gain.py trash    # needs PIPELINE_MATERIAL: ResNet-18, ImageNet weights, 3 epochs, 128 px

Prints accuracy with intervals, and the difference with a paired 95 % bootstrap interval over the test images.
"""

import csv
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from pipeline.cli import main

ROOT = Path(__file__).resolve().parents[1]


def fit(home: Path, *arguments: str) -> tuple[dict, dict[str, bool]]:
    """Run ``fit`` in a folder of its own; its summary, and whether each test image was recognised."""
    home.mkdir()
    os.chdir(home)
    if main(["fit", "--quiet", *arguments]) != 0:
        raise SystemExit("fit failed")
    (folder,) = (home / "runs").iterdir()
    with (folder / "predictions.csv").open(newline="") as file:
        right = {row["path"]: row["target"] == row["label"] for row in csv.DictReader(file)}
    return json.loads((folder / "summary.json").read_text()), right


def cases(which: str) -> tuple[list[str], list[str]]:
    """Arguments with pretrained weights, and without."""
    if which == "elpv":
        scratch = [f"--config={ROOT / 'configs/quickstart.yaml'}", "--model.weights=null"]
        return [f"--config={ROOT / 'configs/elpv_lite0.yaml'}"], scratch
    material = os.environ.get("PIPELINE_MATERIAL")
    if which != "trash" or material is None:
        raise SystemExit(__doc__)
    shared = Path(material).resolve()
    base = [
        f"--config={ROOT / 'configs/finetune.yaml'}",
        f"--data.root={shared / 'data/trashnet/images'}",
        "--model.backbone=resnet18",
        "--trainer.max_epochs=3",
        "--data.image_size=128",
    ]
    weights = shared / "weights/resnet18_imagenet.fp16.safetensors"
    return [*base, f"--model.weights={weights}"], [*base, "--model.weights=null"]


def compare(which: str) -> None:
    """Run both and print the comparison."""
    with tempfile.TemporaryDirectory() as scratch:
        pretrained, from_scratch = cases(which)
        first, right = fit(Path(scratch) / "pretrained", *pretrained)
        second, right_scratch = fit(Path(scratch) / "from_scratch", *from_scratch)
        os.chdir(ROOT)
    paths = sorted(right)
    assert paths == sorted(right_scratch)
    gain = np.array([right[path] for path in paths], float) - np.array([right_scratch[path] for path in paths], float)
    rng = np.random.default_rng(0)
    draws = [gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(2000)]
    low, high = np.percentile(draws, (2.5, 97.5))
    print(f"\n{which}: {len(paths)} test images")
    for name, summary in (("pretrained", first), ("from scratch", second)):
        metric = summary["metrics"]["test/accuracy"]
        seconds = summary["wall_seconds"]
        print(
            f"  {name:<13} accuracy {metric['value']:.4f} [{metric['low']:.4f}, {metric['high']:.4f}]  {seconds:.0f} s"
        )
    print(f"  difference    {100 * gain.mean():+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")


if __name__ == "__main__":
    compare(sys.argv[1] if len(sys.argv) > 1 else "")
