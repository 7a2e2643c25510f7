"""What 1,000 images are worth in one, five and fifteen minutes: accuracy, and whether the time was kept.

    PIPELINE_MATERIAL=... python benchmarks/budgets.py --seeds 0            # an hour on two cores without bf16
    python benchmarks/budgets.py --report                                   # the tables of what has been run

Of each source, 750 images train and 250 test, near-duplicates on one side (as ``benchmarks/transfer.py`` divides them).
Ours, with a budget, and a logistic regression on frozen features of 160 px start from the same ResNet-18. Seconds run
from the start of a process to its end, and count where no others took more than a twentieth of the processors' time. A
budget is kept where they are at most 1.15 times as many; a run that needs less is over earlier.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cases import Case, Image, divide
from transfer import Workplace, add_folders, keep_result, key_of, material_folder, read_results
from transfer_report import DISTURBED, Result, mean_of, report

MINUTES, PROBE = (1, 5, 15), "logistic_regression"
CONTESTANTS = {f"ours --budget={minutes}m": 60 * minutes for minutes in MINUTES}
COUNTS = {"train": 750, "test": 250}
PROMISE = 1.15


@dataclass(frozen=True)
class Thousand(Case):
    """1,000 images of a source."""

    def __str__(self) -> str:
        return f"{self.source}-{sum(COUNTS.values())}"


CASES = {str(case): case for case in (Thousand(source, few=False) for source in ("trash", "elpv", "cells"))}


def prepare(workplace: Workplace, case: Thousand, seed: int) -> Path:
    """The tables of a case in a folder of its own."""
    images = divide(workplace.images(case.source), seed)
    rng = np.random.default_rng((sum(COUNTS.values()), seed))
    drawn: list[Image] = []
    for split, count in COUNTS.items():
        there = [image for image in images if image.split == split]
        drawn += [there[row] for row in rng.permutation(len(there))[:count]]
    return workplace.write_tables(case, seed, drawn)


def kept(results: Sequence[Result]) -> str:
    """By budget: how many runs kept it, the longest one, and what more time gained, paired by case and seed."""
    lines = [
        "",
        "| budget | kept | longest, s | accuracy, against the one before | log loss |",
        "|---|---|---:|---:|---:|",
    ]
    before: dict[object, Result] = {}
    for contestant, seconds in CONTESTANTS.items():
        runs = {(run["case"], run["seed"]): run for run in results if run["contestant"] == contestant}
        timed = [run["seconds"] for run in runs.values() if run["others"] <= DISTURBED]
        if not timed:
            continue
        promised = sum(taken <= PROMISE * seconds for taken in timed)
        gained = [""] * 2
        if pairs := [(run, before[key]) for key, run in runs.items() if key in before]:
            more = mean_of([[run["accuracy"] - other["accuracy"] for run, other in pairs]])
            less = mean_of([[run["log_loss"] - other["log_loss"] for run, other in pairs]])
            gained = [f"{more.points('+')} (n = {len(pairs)})", less.shown(3, "+")]
        lines.append(f"| {seconds} s | {promised} of {len(timed)} | {max(timed):.0f} | {' | '.join(gained)} |")
        before = runs
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--minutes", nargs="+", type=int, choices=MINUTES, default=list(MINUTES), help="default: all")
    parser.add_argument("--report", action="store_true", help="run nothing")
    add_folders(parser, "budgets.jsonl")
    arguments = parser.parse_args()
    if not arguments.report:
        run(arguments)
    results = read_results(arguments.results)
    print(report(results, list(CASES)))
    print(kept(results))


def run(arguments: argparse.Namespace) -> None:
    """Whatever has not been run."""
    workplace = Workplace(arguments.work.resolve(), material_folder(), None)
    done = {key_of(result) for result in read_results(arguments.results)}
    for case in (CASES[name] for name in arguments.cases):
        for seed in arguments.seeds:
            for contestant in (PROBE, *(f"ours --budget={minutes}m" for minutes in arguments.minutes)):
                if (str(case), seed, contestant) in done:
                    continue
                result = workplace.compete(case, seed, contestant, prepare(workplace, case, seed))
                keep_result(arguments.results, result)
                said = f"{result['accuracy']:.4f} in {result['seconds']:.0f} s"
                print(f"{case}, seed {seed}, {contestant}: {said}", flush=True)


if __name__ == "__main__":
    main()
