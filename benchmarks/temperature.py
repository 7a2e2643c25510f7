"""How far a temperature may go by what few images say: the width of its prior, by the log loss of other images.

    PIPELINE_MATERIAL=... python benchmarks/temperature.py     # trains what is not there, half an hour on two cores
    PIPELINE_MATERIAL=... python benchmarks/temperature.py --cases trash-750 elpv-750 --seeds 0 1

Networks are trained by ``fit`` with nothing but the data given, on the divisions of ``benchmarks/defaults.py`` (the
quarter by which ours is compared with its peers is left out, a quarter of the rest tests), with 20 images a class, 750
images, or in full. Then some of the test images validate, 60 draws of them, and the others say what the temperature
that they ask for is worth. First table: the networks, and the temperature that all of their test images ask for.
Second: by the width of the prior (the standard deviation of the temperature's logarithm) and the number of validation
images, by how much log loss is above that of the best temperature, in thousandths of a nat: mean and worst network.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cases import FEW, Case, divide, read_csv
from transfer import Workplace, add_work, material_folder

from pipeline.evaluation.calibration import fit_temperature, tempered
from pipeline.evaluation.predictions import Predictions

CASES = ("trash-20", "trash-750", "elpv-750", "trash-full", "elpv-full")
WIDTHS = (1.0, 0.5, 0.3, 0.2, 0.1)
NUMBERS, DRAWS = (40, 75, 150), 60


def trained(workplace: Workplace, case: str, seed: int) -> Path:
    """The folder with the test's predictions and the summary of a run, which is made where there is none."""
    kept = workplace.folder / "temperature" / f"{case}-{seed}"
    if not kept.is_dir():
        source, _, number = case.rpartition("-")
        development = Case(source, few=number == str(FEW), development=True)
        if number in ("full", str(FEW)):
            tables = workplace.prepare(development, seed)
        else:
            images = divide(workplace.images(source), seed)
            images = divide([image._replace(split=None) for image in images if image.split == "train"], seed)
            train = [row for row, image in enumerate(images) if image.split == "train"]
            drawn = set(np.random.default_rng((int(number), seed)).choice(train, int(number), replace=False).tolist())
            rest = [image for row, image in enumerate(images) if row in drawn or image.split == "test"]
            tables = workplace.write_tables(development, seed, rest)
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name).resolve()
            command = ["-m", "pipeline", "fit", "--quiet", "--data=datamodules.ManifestDataModule"]
            command += [f"--data.manifest={tables / 'manifest.csv'}", f"--data.root={workplace.root(source)}"]
            command += [*workplace.network, f"--seed_everything={seed}", "--trainer.logger=false"]
            workplace.run(command, scratch, f"temperature-{case}-{seed}")
            (run,) = scratch.glob("runs/*")
            kept.parent.mkdir(exist_ok=True)
            shutil.copytree(run, kept, ignore=shutil.ignore_patterns("*.ckpt"))
    return kept


def untempered(run: Path) -> Predictions:
    """What the network said of the test images before its temperature."""
    summary = json.loads((run / "summary.json").read_text())
    rows, classes = read_csv(run / "predictions.csv"), summary["classes"]
    targets = np.array([classes.index(row["target"]) for row in rows])
    probabilities = np.array([[float(row[f"p_{name}"]) for name in classes] for row in rows])
    return tempered(Predictions(targets, probabilities), 1 / summary["temperature"])


def some(predictions: Predictions, rows: Sequence[int]) -> Predictions:
    return Predictions(predictions.targets[rows], predictions.probabilities[rows])


def excess(predictions: Predictions, number: int, width: float, best: float) -> float:
    """Log loss beyond that of the best temperature, where so many images choose it."""
    rng, lost = np.random.default_rng(0), []
    for _ in range(DRAWS):
        order = rng.permutation(len(predictions.targets))
        others = some(predictions, order[number:])
        chosen = fit_temperature(some(predictions, order[:number]), width)
        lost.append(tempered(others, chosen).losses.mean() - tempered(others, best).losses.mean())
    return float(np.mean(lost))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="source and 20, full, or a number; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    add_work(parser)
    given = parser.parse_args()
    workplace = Workplace(given.work.resolve(), material_folder(), None)
    networks: list[tuple[Predictions, float]] = []
    print("| network | test images | right, % | temperature asked for | log loss as it comes | at that temperature |")
    print("|---|---:|---:|---:|---:|---:|")
    for case in given.cases:
        for seed in given.seeds:
            made = untempered(trained(workplace, case, seed))
            best = fit_temperature(made, width=np.inf)
            networks.append((made, best))
            losses = f"{made.losses.mean():.3f} | {tempered(made, best).losses.mean():.3f}"
            right = 100 * made.right.mean()
            print(f"| {case}, seed {seed} | {len(made.targets)} | {right:.1f} | {best:.2f} | {losses} |", flush=True)
    print(f"\n| width of the prior | {' | '.join(f'{number} validate' for number in NUMBERS)} |")
    print("|---:|" + "---:|" * len(NUMBERS))
    for width in WIDTHS:
        cells = []
        for number in NUMBERS:
            lost = [1000 * excess(made, number, width, best) for made, best in networks]
            cells.append(f"{np.mean(lost):.1f}, {max(lost):.1f}")
        print(f"| {width:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
