"""A classifier from 1,000 images in a minute: ours with ``--budget 1m`` against a logistic regression.

    PIPELINE_MATERIAL=... python benchmarks/minute.py                       # fifteen minutes on two cores

Of each source, 750 images train and 250 test, near-duplicates on one side (as ``benchmarks/transfer.py`` divides them).
Both start from the same ResNet-18; the peer classifies its frozen features of 160 px. Seconds run from the start of a
process to its end.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transfer import (
    Case,
    Image,
    Workplace,
    add_folders,
    divide,
    keep_result,
    key_of,
    material_folder,
    read_results,
)
from transfer_report import report

OURS, PEER = "ours --budget=1m", "logistic_regression"
COUNTS = {"train": 750, "test": 250}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add_folders(parser, "minute.jsonl")
    arguments = parser.parse_args()
    workplace = Workplace(arguments.work.resolve(), material_folder(), None)
    done = {key_of(result) for result in read_results(arguments.results)}
    for case in (CASES[name] for name in arguments.cases):
        for seed in arguments.seeds:
            for contestant in (OURS, PEER):
                if (str(case), seed, contestant) in done:
                    continue
                result = workplace.compete(case, seed, contestant, prepare(workplace, case, seed))
                keep_result(arguments.results, result)
                said = f"{result['accuracy']:.4f} in {result['seconds']:.0f} s"
                print(f"{case}, seed {seed}, {contestant}: {said}", flush=True)
    print(report(read_results(arguments.results), list(CASES)))


if __name__ == "__main__":
    main()
