"""Ours with nothing but the data given, against its peers with their own defaults: same weights, images and machine.

    pip install -c constraints.txt -e ".[test,peers]"
    PIPELINE_MATERIAL=... python benchmarks/transfer.py                     # everything: about five hours on two cores
    PIPELINE_MATERIAL=... python benchmarks/transfer.py --cases trash-20 --contestants ours hf_trainer --seeds 0
    PIPELINE_MATERIAL=... python benchmarks/transfer.py --contestants ours -- --model.mixing=mixup  # a variant of ours
    python benchmarks/transfer.py --report                                  # the tables of what has been run

Cases: trash, elpv and cells, each in full and with 20 images a class. Groups of near-duplicates, as ``python -m
pipeline audit`` finds them, stay on one side of the divisions of trash and elpv, a quarter of which tests, another one
for each seed. Cells come divided: their seeds differ in the training alone and, with 20 a class, in the images drawn.

Every contestant is a process of its own, with nothing beside it; seconds run from its start to its end. It starts from
the same ResNet-18 and is told the same training images, all of which the peers train on; ours draws its validation
images from them. Peers see images of 160 px for 5 epochs (20 with 20 images a class) in float32; ours is told nothing.
GPUs are hidden from all. Each result is written at once as a JSON line of ``results.jsonl`` in the work folder, where a
second run goes on; ``right`` has a digit for each image of the case's ``test.csv``, which lies there, too.
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import f1_score

from datamodules.splits import grouped_split
from datamodules.table import list_images
from pipeline.provenance import code_revision

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("hf_trainer", "logistic_regression", "fastai_fine_tune", "pytorch_tutorial", "timm_adamw")
OURS = "ours"
SIZE, TEST_SHARE, FEW = 160, 0.25, 20
#: The smallest probability that eight decimals, which all contestants write, can tell from 0.
SMALLEST = 1e-8
#: What the defaults are held to: points ahead of the best peer's mean, points behind a case's best peer, its seconds.
AHEAD, BEHIND, SLOWER = 1.5, 0.5, 0.5

Result = dict[str, Any]


class Image(NamedTuple):
    """An image by its path below the root, with what the division goes by."""

    path: str
    label: str
    group: str
    split: str | None = None


@dataclass(frozen=True)
class Case:
    """Images of one source, all that train or 20 a class."""

    source: str
    few: bool

    def __str__(self) -> str:
        return f"{self.source}-{FEW if self.few else 'full'}"

    @property
    def epochs(self) -> int:
        return 20 if self.few else 5

    @property
    def seeds(self) -> range:
        return range(5 if self.few else 3)


CASES = {str(case): case for few in (True, False) for case in (Case(name, few) for name in ("trash", "elpv", "cells"))}


class Workplace:
    """The folder where everything is kept, and what contestants are started with."""

    def __init__(self, folder: Path, material: Path, epochs: int | None) -> None:
        self.folder, self.material, self.epochs = folder, material, epochs
        self.weights = material / "weights/resnet18_imagenet.fp16.safetensors"
        self.network = ("--model.backbone=resnet18", f"--model.weights={self.weights}")
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def root(self, source: str) -> Path:
        if source == "elpv":
            return Path(str(files("elpv_dataset") / "data"))
        return self.material / "data" / {"trash": "trashnet/images", "cells": "bccd-cells"}[source]

    def images(self, source: str) -> list[Image]:
        """All of a source."""
        root = self.root(source)
        if source == "cells":
            given = [path.split("/") for path in list_images(root, root)]
            return [Image("/".join(path), path[1], "/".join(path), path[0]) for path in given]
        groups = self.folder / f"{source}_groups.csv"
        if not groups.is_file():
            self.audit(source, groups)
        return [Image(row["path"], row["label"], row["group"]) for row in read_csv(groups)]

    def audit(self, source: str, groups: Path) -> None:
        """Have our own audit find what must not be on both sides."""
        module = "ElpvDataModule" if source == "elpv" else "ImageFolderDataModule"
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            scratch = Path(name)
            command = ["-m", "pipeline", "audit", f"--to={scratch}", f"--data=datamodules.{module}"]
            command += [f"--data.root={self.root(source)}", *self.network]
            self.run(command, scratch, f"{source}_audit")
            (scratch / "audit_groups.csv").rename(groups)

    def run(self, arguments: Sequence[str], scratch: Path, name: str) -> float:
        """Seconds that a Python process takes, in a folder that it may fill.

        Raises:
            ChildProcessError: it failed; its output is in the log of that name.
        """
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),  # whatever is installed: this checkout
            "MLFLOW_TRACKING_URI": f"sqlite:///{scratch / 'mlflow.db'}",
            "XDG_CACHE_HOME": str(scratch / "cache"),  # ours would find the features of an earlier run there ...
            "MPLCONFIGDIR": str(self.folder / "matplotlib"),  # ... and matplotlib not the fonts, and look for them
        }
        log = self.folder / "logs" / f"{''.join(c if c.isalnum() else '-' for c in name)[:100]}.log"
        with log.open("w") as output:
            started = time.perf_counter()
            code = subprocess.run(
                [sys.executable, *arguments], cwd=scratch, env=environment, stdout=output, stderr=subprocess.STDOUT
            ).returncode
            seconds = time.perf_counter() - started
        if code != 0:
            raise ChildProcessError(f"{name}: exit code {code}, see {log}")
        return seconds

    def warm_up(self, contestant: str) -> None:
        """Have the libraries read from disk once, so that whoever is first does not wait for it."""
        imports = ["-c", "import matplotlib.font_manager, mlflow, pipeline.transfer_cli"]
        with tempfile.TemporaryDirectory() as scratch:
            self.run(imports if is_ours(contestant) else [script(contestant), "--help"], Path(scratch), "warm-up")

    def prepare(self, case: Case, seed: int) -> Path:
        """The tables of a case in a folder of its own."""
        folder = self.folder / "cases" / f"{case}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        images = divide(self.images(case.source), seed)
        if case.few:
            images = draw(images, seed)
        root = self.root(case.source)
        for split in ("train", "test"):
            rows = [(root / image.path, image.label) for image in images if image.split == split]
            write_csv(folder / f"{split}.csv", ("path", "label"), rows)
        write_csv(folder / "manifest.csv", ("path", "label", "split"), [(i.path, i.label, i.split) for i in images])
        return folder

    def compete(self, case: Case, seed: int, contestant: str, tables: Path) -> Result:
        """Run a contestant and judge its answers."""
        root, epochs = self.root(case.source), case.epochs if self.epochs is None else self.epochs
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name).resolve()
            if is_ours(contestant):
                told = shlex.split(contestant)[1:]
                command = ["-m", "pipeline", "fit", "--quiet", "--data=datamodules.ManifestDataModule"]
                command += [f"--data.manifest={tables / 'manifest.csv'}", f"--data.root={root}", *self.network]
                command += [f"--seed_everything={seed}", *told]
            else:
                command = [script(contestant), f"--images={tables / 'train.csv'}", f"--test={tables / 'test.csv'}"]
                command += [f"--weights={self.weights}", f"--epochs={epochs}", f"--size={SIZE}", f"--seed={seed}"]
                command += [f"--output={scratch / 'probabilities.csv'}"]
            seconds = self.run(command, scratch, f"{case}-{seed}-{contestant}")
            (answers,) = scratch.glob("runs/*/predictions.csv" if is_ours(contestant) else "probabilities.csv")
            judged = judge(answers, root, tables / "test.csv")
        key: Result = {"case": str(case), "seed": seed, "contestant": contestant}
        machine = {"processors": os.cpu_count(), "revision": code_revision()}
        return {**key, **judged, "seconds": round(seconds, 2), "peers_epochs": epochs, **machine}


def script(peer: str) -> str:
    return str(ROOT / "benchmarks" / "peers" / f"{peer}.py")


def divide(images: list[Image], seed: int) -> list[Image]:
    """Give images that come undivided a split; of others, validation images train."""
    if images[0].split is not None:
        return [image._replace(split="test" if image.split == "test" else "train") for image in images]
    groups, classes = [image.group for image in images], [(image.label,) for image in images]
    shares = {"train": 1 - TEST_SHARE, "test": TEST_SHARE}
    splits = grouped_split(groups, classes, shares, seed, complete="train")
    return [image._replace(split=str(split)) for image, split in zip(images, splits, strict=True)]


def draw(images: list[Image], seed: int) -> list[Image]:
    """The test images, and 20 a class of those that train."""
    rng = np.random.default_rng((FEW, seed))
    kept = [row for row, image in enumerate(images) if image.split == "test"]
    for label in sorted({image.label for image in images}):
        of_class = [row for row, image in enumerate(images) if image.split == "train" and image.label == label]
        kept += rng.choice(of_class, FEW, replace=False).tolist()
    return [images[row] for row in sorted(kept)]


def judge(answers: Path, root: Path, test: Path) -> Result:
    """What the probabilities of the test images are worth."""
    rows = {str(root / row["path"]): row for row in read_csv(answers)}
    truth = read_csv(test)
    classes = [column.removeprefix("p_") for column in next(iter(rows.values())) if column.startswith("p_")]
    targets = np.array([classes.index(row["label"]) for row in truth])
    probabilities = np.array([[float(rows[row["path"]][f"p_{name}"]) for name in classes] for row in truth])
    labels = probabilities.argmax(axis=1)
    of_truth = probabilities[np.arange(len(targets)), targets]
    return {
        "accuracy": float(np.mean(labels == targets)),
        "macro_f1": float(f1_score(targets, labels, average="macro")),
        "log_loss": float(-np.log(of_truth.clip(SMALLEST)).mean()),
        "right": "".join(str(int(right)) for right in labels == targets),
    }


def is_ours(contestant: str) -> bool:
    return contestant.split()[0] == OURS


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def write_csv(file: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows([header, *rows])


def read_results(file: Path) -> list[Result]:
    """The last result of each case, seed and contestant."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    results = [json.loads(line) for line in lines]
    return list({key_of(result): result for result in results}.values())


def key_of(result: Result) -> tuple[str, int, str]:
    return result["case"], result["seed"], result["contestant"]


# The report


class Mean(NamedTuple):
    """A mean with half of its 95 % interval (not a number where there are fewer than two values)."""

    value: float
    half: float

    def points(self, sign: str = "") -> str:
        """In percentage points."""
        value = f"{100 * self.value:{sign}.1f}"
        return value if np.isnan(self.half) else f"{value} ± {100 * self.half:.1f}"


def mean_of(samples: Sequence[Sequence[float]]) -> Mean:
    """The mean of the samples' means, all weighing alike, with its t interval (of several: Welch and Satterthwaite's).

    Example:
        >>> mean_of([[0.7, 0.8, 0.9]]).points()
        '80.0 ± 24.8'
    """
    value = float(np.mean([np.mean(sample) for sample in samples]))
    if min(map(len, samples)) < 2:
        return Mean(value, np.nan)
    variances = np.array([np.var(sample, ddof=1) / len(sample) for sample in samples])
    if variances.sum() == 0:
        return Mean(value, 0.0)
    freedom = variances.sum() ** 2 / sum(variances**2 / [len(sample) - 1 for sample in samples])
    return Mean(value, float(stats.t.ppf(0.975, freedom) * np.sqrt(variances.sum()) / len(samples)))


class Standing:
    """Results by case, contestant and seed."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._results: dict[tuple[str, str], dict[int, Result]] = {}
        for result in results:
            self._results.setdefault((result["case"], result["contestant"]), {})[result["seed"]] = result
        self.cases = [name for name in CASES if any(case == name for case, _ in self._results)]
        self.contestants = sorted({contestant for _, contestant in self._results})

    def there(self, cases: Sequence[str]) -> list[str]:
        """Who has results of all these cases, best first."""
        there = [name for name in self.contestants if all((case, name) in self._results for case in cases)]
        return sorted(there, key=lambda name: -mean_of(self.samples(cases, name, "accuracy")).value)

    def best_peer(self, cases: Sequence[str]) -> str | None:
        """By mean accuracy."""
        return next((name for name in self.there(cases) if not is_ours(name)), None)

    def samples(self, cases: Sequence[str], contestant: str, value: str) -> list[list[float]]:
        """A value of each case by seed."""
        return [[result[value] for result in self._results[case, contestant].values()] for case in cases]

    def comparisons(self, cases: Sequence[str]) -> Iterator[tuple[str, str, list[list[float]], float]]:
        """Each of ours, the best peer, differences in accuracy by case and seed, and the ratio of seconds."""
        peer = self.best_peer(cases)
        for ours in filter(is_ours, self.there(cases)):
            if peer is None:
                continue
            pairs = [(self._results[case, ours], self._results[case, peer]) for case in cases]
            differences = [
                [a[seed]["accuracy"] - b[seed]["accuracy"] for seed in a.keys() & b.keys()] for a, b in pairs
            ]
            one, other = (mean_of(self.samples(cases, name, "seconds")).value for name in (ours, peer))
            if all(differences):
                yield ours, peer, differences, one / other


def report(results: Sequence[Result]) -> str:
    """A table of each case and one of their mean; below each, ours against the best peer, and the targets."""
    standing = Standing(results)
    parts = []
    for case in standing.cases:
        parts += [f"\n{case}\n", table(standing, [case]), *against_best(standing, [case])]
    parts += [f"\nmean over {len(standing.cases)} of {len(CASES)} cases\n", table(standing, standing.cases)]
    return "\n".join([*parts, *against_best(standing, standing.cases, AHEAD)])


def table(standing: Standing, cases: Sequence[str]) -> str:
    """Means with intervals over seeds of everybody who has results of all these cases."""
    there = standing.there(cases)
    width = max(map(len, there), default=0)
    lines = [
        f"| {'contestant':<{width}} | seeds | accuracy, % | macro-F1, % |        log loss | seconds |",
        f"|{'-' * (width + 2)}|------:|------------:|------------:|----------------:|--------:|",
    ]
    for name in there:
        accuracy, macro_f1, log_loss, seconds = (
            mean_of(standing.samples(cases, name, value)) for value in ("accuracy", "macro_f1", "log_loss", "seconds")
        )
        counts = sorted({len(sample) for sample in standing.samples(cases, name, "accuracy")})
        loss = f"{log_loss.value:.3f}" if np.isnan(log_loss.half) else f"{log_loss.value:.3f} ± {log_loss.half:.3f}"
        lines.append(
            f"| {name:<{width}} | {'-'.join(map(str, counts)):>5} | {accuracy.points():>11} | {macro_f1.points():>11} "
            f"| {loss:>15} | {seconds.value:>7.1f} |"
        )
    return "\n".join(lines)


def against_best(standing: Standing, cases: Sequence[str], target: float | None = None) -> list[str]:
    """Ours against the best peer of these cases, paired by seed, and whether that meets what is asked.

    Args:
        standing: the results.
        cases: which of them.
        target: points that the mean is to be ahead; None: the interval is not to lie below all of what is allowed,
            nor are the seconds to exceed their share.
    """
    lines = []
    for ours, peer, differences, ratio in standing.comparisons(cases):
        mean, counted = mean_of(differences), min(map(len, differences))
        lines.append(f"{ours} against {peer}, paired by seed")
        if target is not None:
            is_met, wanted = 100 * mean.value >= target, f"at least +{target}"
        else:  # with one seed there is no interval, and nothing is shown
            is_met, wanted = counted > 1 and 100 * (mean.value + mean.half) >= -BEHIND, f"not all below -{BEHIND}"
        lines.append(f"  {verdict(is_met)}  {mean.points('+')} points of accuracy, n = {counted} ({wanted})")
        told = f"{ratio:.2f} of its seconds"
        lines.append(f"  {verdict(ratio <= SLOWER)}  {told} (at most {SLOWER})" if target is None else f"  {told}")
    return lines


def verdict(is_met: bool) -> str:
    return "met    " if is_met else "not met"


def main() -> None:
    given, told = sys.argv[1:], []
    if "--" in given:
        given, told = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What follows -- is passed to ours, whose results are then kept under another name.",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    everybody = [OURS, *PEERS]
    names = ", ".join(everybody)
    parser.add_argument("--contestants", nargs="+", choices=everybody, default=everybody, metavar="NAME", help=names)
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 4 with 20 images a class, 0 to 2 in full")
    parser.add_argument("--epochs", type=int, help="of the peers; to try the machinery, in a work folder of its own")
    parser.add_argument("--again", action="store_true", help="run what has results, too")
    parser.add_argument("--report", action="store_true", help="only print the tables of what has been run")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "transfer-pipeline" / "benchmark"
    parser.add_argument("--work", type=Path, default=cache, help="folder for all that is kept; default: %(default)s")
    arguments = parser.parse_args(given)
    file = arguments.work.resolve() / "results.jsonl"
    if not arguments.report:
        material = os.environ.get("PIPELINE_MATERIAL")
        if material is None:
            sys.exit("PIPELINE_MATERIAL: expected the folder with data and weights, found it unset.")
        workplace = Workplace(file.parent, Path(material).resolve(), arguments.epochs)
        contestants = [shlex.join([OURS, *told]) if name == OURS else name for name in arguments.contestants]
        done = set() if arguments.again else {key_of(result) for result in read_results(file)}
        work = [
            (case, seed, left)
            for case in map(CASES.__getitem__, arguments.cases)
            for seed in arguments.seeds or case.seeds
            if (left := [name for name in contestants if (str(case), seed, name) not in done])
        ]
        failed = run_all(workplace, work, file)
    shown = [result for result in read_results(file) if result["case"] in arguments.cases]
    shown = [result for result in shown if arguments.seeds is None or result["seed"] in arguments.seeds]
    print(report(shown) if shown else f"no results in {file}")
    if not arguments.report and failed:
        sys.exit(f"{failed} failed")


def run_all(workplace: Workplace, work: Sequence[tuple[Case, int, list[str]]], file: Path) -> int:
    """Run contestants one after the other and write each result; how many failed."""
    failed = 0
    for contestant in dict.fromkeys(name for _, _, left in work for name in left):
        workplace.warm_up(contestant)
    for case, seed, contestants in work:
        tables = workplace.prepare(case, seed)
        for contestant in contestants:
            print(f"{case}, seed {seed}, {contestant} ... ", end="", flush=True)
            try:
                result = workplace.compete(case, seed, contestant, tables)
            except ChildProcessError as error:  # the others may still finish
                print(error)
                failed += 1
                continue
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(result) + "\n")
            print(f"accuracy {result['accuracy']:.4f} in {result['seconds']:.0f} s")
    return failed


if __name__ == "__main__":
    main()
