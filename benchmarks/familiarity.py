"""How well strange images are told from familiar ones: a classifier of waste is shown other things.

    PIPELINE_MATERIAL=... python benchmarks/familiarity.py                              # some ten minutes on two cores
    PIPELINE_MATERIAL=... python benchmarks/familiarity.py -- --finetuning=LinearProbe  # what follows -- is for fit

One class of waste is left out of the training, validation and test images (``trash``, which has the fewest). The
classifier is then asked about the test images, solar cells, blood cells, and the waste that it never saw. The area
under the ROC curve is the chance that a test image seems more familiar than one of those; beside it the same by the
score of the label, which is what one has without familiarity. Intervals are of 95 %, from 2,000 bootstrap resamples.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from cases import divide, read_csv, write_csv
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from transfer import Workplace, add_work, material_folder

from pipeline.evaluation.familiarity import STRANGE

LEFT_OUT, MOST, RESAMPLES = "trash", 400, 2_000


def tables(workplace: Workplace, folder: Path) -> tuple[Path, dict[str, Path]]:
    """The manifest of the waste without a class, and by name lists of other images."""
    waste, root = divide(workplace.images("trash"), seed=0), workplace.root("trash")
    kept = [image for image in waste if image.label != LEFT_OUT]
    manifest = folder / "manifest.csv"
    write_csv(manifest, ("path", "label", "split"), [(i.path, i.label, i.split) for i in kept])
    others = {f"waste never seen ({LEFT_OUT})": [root / i.path for i in waste if i.label == LEFT_OUT]}
    for name, source in (("solar cells", "elpv"), ("blood cells", "cells")):
        images = workplace.images(source)
        chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:MOST])
        others[name] = [workplace.root(source) / images[index].path for index in chosen]
    lists = {}
    for number, (name, paths) in enumerate(others.items()):
        lists[name] = folder / f"{number}.csv"
        write_csv(lists[name], ("path",), [(path,) for path in paths])
    return manifest, lists


def said(answers: Path) -> dict[str, NDArray[np.float64]]:
    """Scores and familiarity of a table of predictions."""
    rows = read_csv(answers)
    return {name: np.array([float(row[name]) for row in rows]) for name in ("score", "familiarity")}


def told_apart(familiar: NDArray[np.float64], strange: NDArray[np.float64]) -> str:
    """Area under the ROC curve, with its interval."""
    rng = np.random.default_rng(0)
    truth = np.repeat([1, 0], [len(familiar), len(strange)])

    def area(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        return float(roc_auc_score(truth, np.concatenate([one, other])))

    drawn = [area(rng.choice(familiar, len(familiar)), rng.choice(strange, len(strange))) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return f"{area(familiar, strange):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    given, told = sys.argv[1:], []
    if "--" in given:
        given, told = given[: given.index("--")], given[given.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work(parser)
    workplace = Workplace(parser.parse_args(given).work.resolve(), material_folder(), None)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name).resolve()
        manifest, others = tables(workplace, scratch)
        command = ["-m", "pipeline", "fit", "--quiet", "--data=datamodules.ManifestDataModule"]
        command += [f"--data.manifest={manifest}", f"--data.root={workplace.root('trash')}", *workplace.network, *told]
        workplace.run(command, scratch, "familiarity")
        (run,) = scratch.glob("runs/*")
        tested = said(run / "predictions.csv")
        print("| shown | images | strange, % | told apart by familiarity | by score |\n|---|---:|---:|---:|---:|")
        share = 100 * np.mean(tested["familiarity"] < STRANGE)
        print(f"| test images of the waste | {len(tested['score']):,} | {share:.1f} | | |")
        for number, (name, paths) in enumerate(others.items()):
            output = scratch / f"answers-{number}.csv"
            command = ["-m", "pipeline", "predict", "--quiet", f"--config={run / 'config.yaml'}"]
            command += [f"--ckpt_path={run / 'best.ckpt'}", f"--data.predict_path={paths}", f"--output={output}"]
            workplace.run(command, scratch, f"familiarity-{number}")
            found = said(output)
            share = 100 * np.mean(found["familiarity"] < STRANGE)
            areas = " | ".join(told_apart(tested[by], found[by]) for by in ("familiarity", "score"))
            print(f"| {name} | {len(found['score']):,} | {share:.1f} | {areas} |", flush=True)


if __name__ == "__main__":
    main()
