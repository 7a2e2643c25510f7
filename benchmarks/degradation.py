"""The degradation experiment: how well 20 and 56 layers fit the training images, without and with shortcuts.

    python benchmarks/degradation.py             # four arms, three seeds each: an hour on two busy cores
    python benchmarks/degradation.py --seeds 1   # one seed
    python benchmarks/degradation.py --draw      # the table and the figure again, from what was stored

Each arm is a run of configs/degradation.yaml; further arguments go to its command line. As many run at once as there
are cores, each on one: networks this small would leave much of a second one idle. Prints the training loss of the
last epoch and the differences between depths, and writes degradation.json and images/degradation.png into docs/, or
into the folder that --out names. After figure 6, left and middle, of K. He et al., "Deep Residual Learning for Image
Recognition" (https://arxiv.org/abs/1512.03385).
"""

import argparse
import contextlib
import csv
import json
import os
import platform
import shlex
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from mlflow import MlflowClient

from pipeline.cli import main

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("plain20", "plain56", "resnet20", "resnet56")
PAIRS = (("plain56", "plain20"), ("resnet56", "resnet20"))


def curve(summary: dict[str, Any], metric: str) -> list[float]:
    """A tracked metric of a run, epoch by epoch."""
    history = MlflowClient(summary["tracking_uri"]).get_metric_history(summary["run_id"], metric)
    return [round(point.value, 5) for point in sorted(history, key=lambda point: point.step)]


def train(arm: str, seed: int, scratch: Path, further: list[str]) -> dict[str, Any]:
    """Run one arm on one core, in a folder of its own; what is kept of it. A process has one tracking store."""
    torch.set_num_threads(1)
    home = scratch / f"{arm}-{seed}"
    home.mkdir()
    os.chdir(home)
    arguments = [
        f"--config={ROOT / 'configs/degradation.yaml'}",
        f"--model.backbone={arm}",
        f"--seed_everything={seed}",
        "--data.num_workers=1",
        f"--logger.tracking_uri=sqlite:///{scratch / f'{os.getpid()}.db'}",
        *further,
    ]
    with (home / "output.txt").open("w") as output, contextlib.redirect_stdout(output):
        if main(["fit", "--quiet", *arguments]) != 0:
            raise SystemExit("fit failed")
    (folder,) = (home / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "split.csv").open(newline="") as file:
        images = Counter(row["split"] for row in csv.DictReader(file))
    return {
        "arm": arm,
        "seed": seed,
        "images": dict(images),
        "code_revision": summary["tags"]["code_revision"],
        "seconds": summary["wall_seconds"],
        "train_loss": curve(summary, "train/loss_epoch"),
        "val_loss": curve(summary, "val/loss"),
    }


def train_all(seeds: int, further: list[str]) -> list[dict[str, Any]]:
    """Every arm with every seed, in order."""
    order = [(arm, seed) for seed in range(seeds) for arm in ARMS]
    runs = []
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(cores()) as pool:
        jobs = [pool.submit(train, arm, seed, Path(scratch).resolve(), further) for arm, seed in order]
        for job in as_completed(jobs):
            run = job.result()
            runs.append(run)
            loss = run["train_loss"][-1]
            print(f"{run['arm']:<9} seed {run['seed']}  training loss {loss:.4f}  {run['seconds']:.0f} s", flush=True)
    return sorted(runs, key=lambda run: order.index((run["arm"], run["seed"])))


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def final_losses(runs: list[dict[str, Any]], arm: str) -> dict[int, float]:
    """Training loss of the last epoch, by seed."""
    return {run["seed"]: run["train_loss"][-1] for run in runs if run["arm"] == arm}


def differences(runs: list[dict[str, Any]], deep: str, shallow: str) -> list[float]:
    """Final training loss of one arm minus that of another, seed by seed (a seed orders the images alike in both)."""
    first, second = final_losses(runs, deep), final_losses(runs, shallow)
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def table(record: dict[str, Any]) -> str:
    """What came out, in a few lines."""
    runs = record["runs"]
    seeds = len({run["seed"] for run in runs})
    lines = [
        f"training loss of epoch {len(runs[0]['train_loss'])}, {record['images']['train']:,} images, "
        f"mean over {seeds} seed{'s' if seeds > 1 else ''} [lowest, highest]"
    ]
    for arm in ARMS:
        losses = list(final_losses(runs, arm).values())
        seconds = np.mean([run["seconds"] for run in runs if run["arm"] == arm])
        lines.append(
            f"  {arm:<20} {np.mean(losses):7.4f}  [{min(losses):7.4f}, {max(losses):7.4f}]  {seconds:4.0f} s a run"
        )
    for deep, shallow in PAIRS:
        gaps = differences(runs, deep, shallow)
        lines.append(
            f"  {f'{deep} - {shallow}':<20} {np.mean(gaps):+7.4f}  [{min(gaps):+7.4f}, {max(gaps):+7.4f}]  "
            f"n = {len(gaps)} seed{'s' if len(gaps) > 1 else ''}"
        )
    return "\n".join(lines)


def figure(record: dict[str, Any]) -> Figure:
    """Training loss by epoch: plain networks left, residual ones right; thin 20 layers, thick 56."""
    drawn = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    for axes, title, pair in ((left, "plain", PAIRS[0]), (right, "residual", PAIRS[1])):
        for arm, color, width in zip(pair, ("tab:red", "tab:blue"), (2.8, 1.3), strict=True):
            curves = np.array([run["train_loss"] for run in record["runs"] if run["arm"] == arm])
            epochs = np.arange(1, curves.shape[1] + 1)
            axes.plot(epochs, curves.T, color=color, linewidth=0.7, alpha=0.4)
            axes.plot(epochs, curves.mean(axis=0), color=color, linewidth=width, label=f"{arm[-2:]} layers")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.legend(loc="lower left", title=f"mean of {len(curves)}, light: each seed" if len(curves) > 1 else None)
    left.set_ylabel("training loss (cross-entropy)")
    left.set_ylim(bottom=0)
    return drawn


def measure(seeds: int, further: list[str]) -> dict[str, Any]:
    """Train, and note with what."""
    runs = train_all(seeds, further)
    return {
        "command": shlex.join(["python", "benchmarks/degradation.py", *sys.argv[1:]]),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "code_revision": runs[0]["code_revision"],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "lightning")},
        "cores": cores(),
        "images": runs[0]["images"],
        "runs": [{key: run[key] for key in ("arm", "seed", "seconds", "train_loss", "val_loss")} for run in runs],
    }


def run() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 11), metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--draw", action="store_true", help="train nothing, read the stored numbers")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of what is written")
    given, further = parser.parse_known_args()
    stored, picture = given.out.resolve() / "degradation.json", given.out.resolve() / "images/degradation.png"
    record = json.loads(stored.read_text()) if given.draw else measure(given.seeds, further)
    picture.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(as_text(record))
    figure(record).savefig(picture)
    print(f"\n{table(record)}")


def as_text(record: dict[str, Any]) -> str:
    """JSON with one line for each run."""
    runs = ",\n".join("    " + json.dumps(run) for run in record["runs"])
    head = json.dumps({name: value for name, value in record.items() if name != "runs"}, indent=2)
    return f'{head[:-2]},\n  "runs": [\n{runs}\n  ]\n}}\n'


if __name__ == "__main__":
    run()
