"""Every default with and without it: what it brings on the three sets, on images that test nothing else.

    PIPELINE_MATERIAL=... python benchmarks/defaults.py                          # everything
    PIPELINE_MATERIAL=... python benchmarks/defaults.py --rows "no warm-up" --seeds 0 1
    PIPELINE_MATERIAL=... python benchmarks/defaults.py --backbone timm/tf_efficientnet_lite0 --results ...
    python benchmarks/defaults.py --report                                       # the table of what has been run

The cases are those of ``benchmarks/transfer.py`` with 20 images a class and, for what matters with many images, in
full; two more have copies of the images at 64 px. But a quarter of the training images tests (another one for each
seed, near-duplicates together), and the images by which ours is compared with its peers are left out: what is chosen
here must not have seen them. Each row changes one thing against what ``fit`` does with nothing but the data given, and
is compared with that seed by seed. Where that leaves the images to a head alone, as the fewest and those in full, heads
are rows themselves, and the others change what is done with them where training is asked for.

Runs go side by side, a processor each: no seconds are taken here. Each result is written at once as a JSON line of
``--results``, where a second run goes on.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import Case
from transfer import (
    BACKBONES,
    LITE,
    SOURCES,
    Result,
    Workplace,
    add_folders,
    keep_result,
    key_of,
    material_folder,
    read_results,
    require_backbone,
)
from transfer_report import OURS, mean_of

FEW = tuple(str(Case(source, few=True, development=True)) for source in SOURCES)
MANY = tuple(str(Case(source, few=False, development=True)) for source in SOURCES[:2])
BOTH = FEW + MANY
SMALL_IMAGES = (
    Case("trash", few=True, development=True, short_side=64),
    Case("elpv", few=False, development=True, short_side=64),
)
SMALL = tuple(map(str, SMALL_IMAGES))
CASES = {
    str(case): case
    for case in (*(Case(name, few, development=True) for few in (True, False) for name in SOURCES), *SMALL_IMAGES)
}
SEEDS = range(4)

#: What rows are compared with in cases that nothing but the data given would leave to a head alone: what is done there
#: where training is asked for.
TRAINED = {
    **dict.fromkeys(FEW[1:], ("--finetuning=ProbeThenFineTune", "--trainer.max_epochs=24", "--model.head_stages=1")),
    **dict.fromkeys((*MANY, SMALL[1]), ("--finetuning=FullFineTuning", "--finetuning.freeze_early=true")),
}

Chosen = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A default, and the run without it.

    Attributes:
        name: of the run without it.
        change: arguments that make it, from what was chosen where nothing was set.
        cases: in which it is tried.
    """

    name: str
    change: Callable[[Chosen], list[str]]
    cases: tuple[str, ...] = FEW


def told(*arguments: str) -> Callable[[Chosen], list[str]]:
    return lambda _: list(arguments)


def times(setting: str, factor: float) -> Callable[[Chosen], list[str]]:
    """What was chosen, so many times."""

    def change(chosen: Chosen) -> list[str]:
        value = factor * chosen[setting]
        return [f"--{setting}={max(1, round(value)) if isinstance(chosen[setting], int) else f'{value:.2g}'}"]

    return change


def rates(factor: float) -> Callable[[Chosen], list[str]]:
    """Both learning rates, so many times."""
    both = [times(f"model.{name}", factor) for name in ("learning_rate", "head_learning_rate")]
    return lambda chosen: [argument for change in both for argument in change(chosen)]


def experiment(name: str) -> Callable[[Chosen], list[str]]:
    return told(f"--trainer.callbacks+=benchmarks.experiments.{name}")


def whole_size(chosen: Chosen) -> list[str]:
    return [f"--data.image_size={chosen['data.init_args.train_size']}"]


def half_reduced(chosen: Chosen) -> list[str]:
    return [f"--data.reduced_epochs={chosen['trainer.max_epochs'] // 2}"]


def colours_kept(chosen: Chosen) -> list[str]:
    return ["--data.train_transforms=light", f"--data.smallest_crop={chosen['data.init_args.smallest_crop']}"]


PROBE_THEN, FRESH = "--finetuning=ProbeThenFineTune", "--finetuning=FullFineTuning"
ALONE = ("--finetuning=LinearProbe", "--finetuning.turned=true", "--model.head_stages=3")
ROWS = (
    Row("fresh head, ten times the rate", told(FRESH, "--finetuning.freeze_early=true")),
    Row("solved head (ProbeThenFineTune)", told(PROBE_THEN), MANY),
    Row("head alone (LinearProbe)", told("--finetuning=LinearProbe"), BOTH),
    Row("head alone on three stages and turned images", told(*ALONE), FEW),
    Row("head alone, by distances", told("--finetuning=KernelProbe", "--model.head_stages=3"), MANY),
    Row("solved head that sees three stages", told(PROBE_THEN, "--model.head_stages=3"), FEW + MANY),
    Row("stage by stage (GradualUnfreezing)", told("--finetuning=GradualUnfreezing")),
    Row("statistics as the weights brought them", told(PROBE_THEN, "--finetuning.measure=false")),
    Row("the last epoch, not between start and end", told(PROBE_THEN, "--finetuning.interpolate=false")),
    Row("the first stages trained, too", told(PROBE_THEN, "--finetuning.freeze_early=false")),
    Row("the first stages trained, too, from a fresh head", told(FRESH), MANY),
    Row("the second stage trained, too", told(FRESH, "--finetuning.freeze_early=true"), FEW[:1]),
    Row("the second stage as it was, too", told(FRESH, "--finetuning.freeze_early=0.07"), MANY),
    Row("half the rate", rates(1 / 2), BOTH),
    Row("twice the rate", rates(2), BOTH),
    Row("ten times the rate for the head", times("model.head_learning_rate", 10)),
    Row("earlier stages at 0.7 of the rate", told("--model.layer_decay=0.7")),
    Row("half the epochs", times("trainer.max_epochs", 0.5), BOTH),
    Row("twice the epochs", times("trainer.max_epochs", 2), BOTH),
    # Of the few, only trash passes from a fresh head, and begins with smaller images.
    Row("images as large from the first epoch on", told("--data.reduced_epochs=0"), FEW[:1]),
    Row("smaller images in the first half", half_reduced, MANY),
    Row("images of 64 px not enlarged", told("--data.train_size=64"), SMALL),
    Row("images of 64 px enlarged to 160 px", told("--data.train_size=160"), SMALL),
    Row("twice the batch, same rate", times("data.init_args.batch_size", 2)),
    Row("normalised by stored statistics", told("--model.batch_norm=stored"), BOTH),
    Row("no warm-up", told("--model.warmup_fraction=0")),
    Row("no weight decay", told("--model.weight_decay=0")),
    Row("gradients clipped at 1", told("--trainer.gradient_clip_val=1")),
    Row("evaluated as large as trained", whole_size, BOTH),
    Row("one view of an image", told("--model.test_time_augmentation=none"), BOTH),
    Row("the middle 0.875 of an image", told("--data.crop_fraction=0.875")),
    Row("crops of at least half the area", told("--data.smallest_crop=0.5")),
    Row("crops of at least a quarter", told("--data.smallest_crop=0.25"), BOTH),
    Row("crops of at least a tenth", told("--data.smallest_crop=0.1"), MANY),
    Row("colours as they are", colours_kept, BOTH),
    Row("mirrored alone, whatever the probe says", told("--data.orientation=mirrored"), BOTH),
    Row("15 % held out", told("--data.val_fraction=0.15"), BOTH),
    Row("nothing held out", told("--data.val_fraction=0"), MANY),
    Row("float32 instead of bf16", told("--trainer.precision=32-true"), BOTH),
    Row("probabilities as they come (no temperature)", experiment("Untempered"), BOTH),
    Row("half of the features dropped", told("--model.dropout=0.5")),
    Row("label smoothing 0.1", experiment("LabelSmoothing"), BOTH),
    Row("mixup", told("--model.mixing=mixup")),
    Row("cutmix", told("--model.mixing=cutmix")),
    Row("moving average of the weights", experiment("MovingAverage")),
    Row("pulled to the start (L2-SP)", experiment("L2SP")),
    Row("stochastic depth 0.1", experiment("StochasticDepth")),
    Row("taught by a ResNet-50 (distillation)", experiment("Distillation")),
)


class Ablation:
    """Runs rows and keeps their results.

    Args:
        workplace: where everything is kept but results, and what runs are started with.
        file: of results.
        jobs: that go side by side.
    """

    def __init__(self, workplace: Workplace, file: Path, jobs: int) -> None:
        self.workplace, self.file, self.jobs = workplace, file, jobs

    def run(self, rows: Sequence[Row], cases: Sequence[str], seeds: Sequence[int]) -> int:
        """What has no result yet, the defaults first; how many failed."""
        failed = self._run_all([(OURS, case, seed, []) for case in cases for seed in seeds])
        chosen = {(r["case"], r["seed"]): r["plan"] for r in read_results(self.file) if r["contestant"] == OURS}
        work = [
            (row.name, case, seed, row.change(chosen[case, seed]))
            for row in rows
            for case in row.cases
            for seed in seeds
            if (case, seed) in chosen and case in cases
        ]
        return failed + self._run_all(work)

    def _run_all(self, work: Sequence[tuple[str, str, int, list[str]]]) -> int:
        done = {key_of(result) for result in read_results(self.file)}
        left = [item for item in work if (item[1], item[2], item[0]) not in done]
        for case, seed in {(case, seed) for _, case, seed, _ in left}:
            self.workplace.prepare(CASES[case], seed)
        with ThreadPoolExecutor(self.jobs) as pool:
            return sum(not is_done for is_done in pool.map(lambda item: self._run(*item), left))

    def _run(self, name: str, case: str, seed: int, arguments: list[str]) -> bool:
        tables = self.workplace.folder / "cases" / f"{case}-{seed}"
        told = [*TRAINED.get(case, ()), *arguments]
        try:
            result = self.workplace.compete(CASES[case], seed, shlex.join([OURS, *told]), tables)
        except ChildProcessError as error:
            print(f"{name}: {error}", flush=True)
            return False
        keep_result(self.file, {**result, "contestant": name})
        print(f"{case}, seed {seed}, {name}: {result['accuracy']:.4f}", flush=True)
        return True


def table(results: Sequence[Result], rows: Sequence[Row]) -> str:
    """In Markdown: accuracy of the defaults, and what is gained or lost by each change, paired by seed.

    Args:
        results: of runs.
        rows: in the order in which they are shown.
    """
    of: dict[tuple[str, str], dict[int, Result]] = {}
    for result in results:
        of.setdefault((result["contestant"], result["case"]), {})[result["seed"]] = result
    cases = [case for case in CASES if (OURS, case) in of]
    lines = [
        f"| | {' | '.join(case.removesuffix('-development') for case in cases)} | mean |",
        "|---|" + "---:|" * (len(cases) + 1),
    ]
    for value, unit in (("accuracy", 100.0), ("log_loss", 1.0)):
        samples = [[unit * result[value] for result in of[OURS, case].values()] for case in cases]
        lines.append(
            f"| **as chosen: {value.replace('_', ' ')}** | {' | '.join(map(shown, samples))} | {shown(*samples)} |"
        )
    for row in rows:
        cells, all_differences = [], []
        for case in cases:
            with_it, without = of[OURS, case], of.get((row.name, case), {})
            both = sorted(with_it.keys() & without.keys())
            if not both:
                cells.append("")
                continue
            points = [100 * (without[seed]["accuracy"] - with_it[seed]["accuracy"]) for seed in both]
            losses = [without[seed]["log_loss"] - with_it[seed]["log_loss"] for seed in both]
            all_differences.append(points)
            cells.append(f"{shown(points, sign='+')}<br>{np.mean(losses):+.3f}")
        if all_differences:
            lines.append(f"| {row.name} | {' | '.join(cells)} | {shown(*all_differences, sign='+')} |")
    counts = sorted({len(found) for (name, _), found in of.items()})
    lines.append(f"\nSeeds: {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} a cell.")
    return "\n".join(lines)


def shown(*samples: Sequence[float], sign: str = "") -> str:
    """A mean with its 95 % t interval."""
    mean = mean_of(samples)
    digits = 1 if abs(mean.value) > 2 or sign else 3
    value = f"{mean.value:{sign}.{digits}f}"
    return value if np.isnan(mean.half) else f"{value} ± {mean.half:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument(
        "--rows", nargs="+", choices=names, default=names, metavar="ROW", help="; ".join(names).replace("%", "%%")
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default: 0 to 3")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="side by side; default: one a processor")
    parser.add_argument("--report", action="store_true", help="only print the table of what has been run")
    parser.add_argument(
        "--backbone",
        choices=(*BACKBONES, LITE),
        default=BACKBONES[0],
        help="default: %(default)s; another: --results elsewhere",
    )
    add_folders(parser, "defaults.jsonl")
    arguments = parser.parse_args()
    failed = 0
    if not arguments.report:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
        require_backbone(arguments.results, arguments.backbone)
        workplace = Workplace(arguments.work.resolve(), material_folder(), None, arguments.backbone)
        rows = [row for row in ROWS if row.name in arguments.rows]
        failed = Ablation(workplace, arguments.results, arguments.jobs).run(rows, arguments.cases, arguments.seeds)
    results = read_results(arguments.results)
    print(table(results, ROWS) if results else "no results")
    if failed:
        sys.exit(f"{failed} failed")


if __name__ == "__main__":
    main()
