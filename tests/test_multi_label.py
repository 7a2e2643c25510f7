"""Several classes an image, or none: from a listing with a separator to the registered model."""

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from mlflow import MlflowClient

from datamodules import DataError
from pipeline.cli import main
from pipeline.monitor import choose_monitor
from pipeline.registry.proof import require_agreement
from pipeline.task import ClassificationTask
from tests.images import RECORD, attach
from tests.support import fast
from tests.tagged import TaggedImages, drawn_labels, write_tagged
from tests.test_distributed import TWO
from tests.test_distributed import pipeline as in_processes

CHANCES = {"blue": 0.5, "green": 0.4, "red": 0.35}
DATA = ["--data=tests.tagged.TaggedImages", "--model.backbone=resnet20"]


def module(root: Path, **settings: Any) -> TaggedImages:
    settings = {"preprocessing": RECORD, "batch_size": 4, "num_workers": 0, "train_transforms": [], **settings}
    return TaggedImages(root=str(root), **settings)


class Run:
    """A finished ``fit`` with squares of three colours."""

    def __init__(self, home: Path) -> None:
        splits = {
            split: drawn_labels(count, CHANCES, seed)
            for seed, (split, count) in enumerate({"train": 72, "val": 24, "test": 30}.items())
        }
        self.images = write_tagged(home / "images", splits)
        self.labels = splits["test"]
        arguments = ["fit", *DATA, *fast(self.images), "--trainer.max_epochs=6", "--registered_model_name=squares"]
        arguments += ["--model.learning_rate=0.01", "--model.head_learning_rate=0.02"]
        with contextlib.chdir(home), (home / "out.txt").open("w") as out, contextlib.redirect_stdout(out):
            assert main(arguments) == 0
        self.shown = (home / "out.txt").read_text()
        (self.folder,) = (home / "runs").iterdir()
        self.summary = json.loads((self.folder / "summary.json").read_text())
        self.rows = read(self.folder / "predictions.csv")
        self.again = [f"--config={self.folder / 'config.yaml'}", f"--ckpt_path={self.folder}"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def probabilities(rows: list[dict[str, str]]) -> np.ndarray:
    return np.array([[float(row[f"p_{name}"]) for name in CHANCES] for row in rows])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


# The data


def test_classes_are_all_that_training_images_have(tmp_path):
    root = write_tagged(tmp_path / "x", {"train": ["red|blue", "", "blue", ""], "val": ["red"], "test": [""]})
    data = module(root)
    assert data.multi_label
    assert data.classes == ["blue", "red"]
    assert data.class_shares == [0.5, 0.25]
    assert data.dataset("train").targets.tolist() == [[1, 1], [0, 0], [1, 0], [0, 0]]
    assert data.dataset("test").targets.tolist() == [[0, 0]]


def test_a_batch_has_a_row_of_targets_for_each_image(tmp_path):
    root = write_tagged(tmp_path / "x", {"train": ["red|blue", "", "blue", "red"], "val": ["red"], "test": [""]})
    data = attach(module(root), TrainerFn.FITTING)
    (batch,) = data.train_dataloader()
    assert batch["target"].dtype == torch.float32
    expected = torch.tensor([[1.0, 1], [0, 0], [1, 0], [0, 1]])
    assert torch.equal(batch["target"], expected[batch["index"]])


def test_one_class_is_enough_and_none_is_too_few(tmp_path):
    one = write_tagged(tmp_path / "one", {"train": ["red", "", "red"], "val": ["red"], "test": [""]})
    assert module(one).classes == ["red"]
    none = write_tagged(tmp_path / "none", {"train": ["", ""], "val": [""], "test": [""]})
    with pytest.raises(DataError, match="expected images of at least 1 classes"):
        module(none)


def test_a_class_that_only_the_test_images_have_is_named(tmp_path):
    root = write_tagged(tmp_path / "x", {"train": ["red", "blue"], "val": ["red"], "test": ["red|green"]})
    with pytest.raises(DataError, match=r"test000.png: expected a class of the training images .* found 'green'"):
        module(root)


# What training tells


def test_the_run_says_what_it_does(run: Run) -> None:
    assert "classes    3, any number an image: blue" in run.shown
    assert "split      train 72, val 24, test 30 (" in run.shown, "images are counted, not their classes"
    assert "monitor    val/macro_f1 (an image may have several classes)" in run.shown
    assert "  mean AP   " in run.shown
    assert "val/mean_average_precision" in next(line for line in run.shown.splitlines() if line.startswith("epoch"))
    assert run.summary["multi_label"] is True


def test_something_was_learned(run: Run) -> None:
    assert run.summary["metrics"]["test/mean_average_precision"]["value"] > 0.8
    assert run.summary["metrics"]["test/macro_f1"]["value"] > 0.6


def test_the_validation_of_training_and_the_one_after_it_are_one(run: Run) -> None:
    client = MlflowClient(run.summary["tracking_uri"], run.summary["tracking_uri"])
    curves = {
        name: [point.value for point in client.get_metric_history(run.summary["run_id"], f"val/{name}")]
        for name in ("macro_f1", "accuracy", "mean_average_precision")
    }
    best = int(np.argmax(curves["macro_f1"]))
    for name, curve in curves.items():
        assert run.summary["metrics"][f"val/{name}"]["value"] == pytest.approx(curve[best], abs=1e-6), name


def test_the_tracked_run_has_bars_and_no_confusion_matrix(run: Run) -> None:
    client = MlflowClient(run.summary["tracking_uri"], run.summary["tracking_uri"])
    kept = {artifact.path for artifact in client.list_artifacts(run.summary["run_id"])}
    assert "classes.png" in kept
    assert "confusion_matrix.png" not in kept


def test_the_monitor_is_macro_f1_unless_another_is_set() -> None:
    even = {"a": 10, "b": 10}
    assert choose_monitor("auto", even, multi_label=True)[0] == "val/macro_f1"
    assert choose_monitor("val/mean_average_precision", even, multi_label=True) == (
        "val/mean_average_precision",
        "as set",
    )


# Predictions


def test_predictions_are_joined_by_bars(run: Run) -> None:
    assert list(run.rows[0]) == ["path", "target", "label", "score", "familiarity", "p_blue", "p_green", "p_red"]
    assert [row["target"] for row in run.rows] == run.labels
    assert "" in run.labels
    values = probabilities(run.rows)
    expected = ["|".join(np.array(list(CHANCES))[row >= 0.5]) for row in values]
    assert [row["label"] for row in run.rows] == expected
    assert [float(row["score"]) for row in run.rows] == pytest.approx(values.max(axis=1))


def test_testing_the_checkpoint_gives_the_numbers_of_the_run(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    assert main(["test", *run.again, f"--output={output}"]) == 0
    assert output.read_text() == (run.folder / "predictions.csv").read_text()
    shown = capsys.readouterr().out
    for name, label in (("accuracy", "accuracy"), ("mean_average_precision", "mean AP")):
        assert f"{label:<9} {run.summary['metrics'][f'test/{name}']['value']:.4f}" in shown


def test_images_without_labels_get_them(run: Run, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for row in run.rows:
        (tmp_path / "new" / row["path"]).write_bytes((run.images / row["path"]).read_bytes())
    output = tmp_path / "out.csv"
    arguments = [f"--ckpt_path={run.folder}", f"--data.predict_path={tmp_path / 'new'}", "--data.num_workers=0"]
    assert main(["predict", *arguments, f"--output={output}"]) == 0
    found = read(output)
    assert list(found[0]) == ["path", "label", "score", "familiarity", "p_blue", "p_green", "p_red"]
    assert [row["label"] for row in found] == [row["label"] for row in run.rows]
    np.testing.assert_allclose(probabilities(found), probabilities(run.rows), atol=1e-6)


def test_the_registered_model_gives_the_same_answers(run: Run) -> None:
    mlflow.set_tracking_uri(run.summary["tracking_uri"])
    try:
        model = mlflow.pyfunc.load_model("models:/squares@challenger")
    finally:
        mlflow.set_tracking_uri(None)
    answer = model.predict(pd.DataFrame({"image": [(run.images / row["path"]).read_bytes() for row in run.rows]}))
    required = [column.name for column in model.metadata.get_output_schema() if column.required]
    assert list(answer.columns) == ["labels", "probabilities", "familiarity"] == required
    assert ["|".join(labels) for labels in answer["labels"]] == [row["label"] for row in run.rows]
    assert any(labels == [] for labels in answer["labels"])
    np.testing.assert_allclose(np.stack(answer["probabilities"]), probabilities(run.rows), atol=1e-4)


def test_an_export_that_differs_in_one_class_is_refused() -> None:
    tested = np.array([[0.9, 0.2], [0.49999, 0.1]])
    require_agreement(tested + 1e-6, tested, multi_label=True, who="It")
    for place, difference in (((0, 1), 1e-3), ((1, 0), 2e-5)):
        served = tested.copy()
        served[place] += difference
        with pytest.raises(RuntimeError, match="disagrees"):
            require_agreement(served, tested, multi_label=True, who="It")


# The training loss and the validation in a task


def batch(target: torch.Tensor) -> dict[str, torch.Tensor]:
    images = torch.randint(0, 256, (len(target), 3, 32, 32), generator=torch.Generator().manual_seed(2))
    return {"image": images.to(torch.uint8), "target": target, "index": torch.arange(len(target))}


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_validation_works_where_autocast_refuses_torch_s_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("binary_cross_entropy is unsafe to autocast")  # what CUDA's autocast says

    task = ClassificationTask(["a", "b"], RECORD, "resnet20", multi_label=True).eval()
    target = torch.tensor([[1.0, 0], [0, 0], [1, 1]])
    with torch.inference_mode():
        probabilities = task.answer(batch(target)["image"]).probabilities
        expected = torch.nn.functional.binary_cross_entropy(probabilities, target)
        monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy", refuse)
        with torch.autocast("cpu", torch.bfloat16):
            task.validation_step(batch(target), 0)
    torch.testing.assert_close(task.val_loss.compute(), expected)


def test_each_class_s_probability_is_its_own(run: Run) -> None:
    task = ClassificationTask.load_from_checkpoint(run.folder / "best.ckpt", map_location="cpu", weights_only=True)
    images = batch(torch.zeros(4, 3))["image"]
    with torch.inference_mode():
        expected = torch.sigmoid(task.eval()(images) / task.temperature)
        torch.testing.assert_close(task.answer(images).probabilities, expected, atol=1e-5, rtol=1e-4)


# Odd data


@pytest.mark.parametrize(
    "splits",
    [
        {"train": ["red", "blue", ""] * 5, "val": ["red", ""] * 3, "test": ["", "red"] * 3},
        {"train": ["red", "blue", "red|blue"] * 5, "val": [""] * 4, "test": [""] * 4},
        {"train": ["red", ""] * 6, "val": ["red", ""] * 3, "test": ["red"] * 4},
    ],
    ids=["a class without images in val and test", "no labels in val and test", "one class"],
)
def test_splits_that_lack_classes_give_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[str]]
) -> None:
    root = write_tagged(tmp_path / "images", splits)
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", *DATA, *fast(root), "--trainer.max_epochs=2", "--trainer.logger=false"]
    assert main([*arguments, "--imbalance=logit_adjustment"]) == 0
    (summary,) = tmp_path.glob("runs/*/summary.json")
    for name, estimate in json.loads(summary.read_text())["metrics"].items():
        assert np.isfinite([estimate["value"], estimate["low"], estimate["high"]]).all(), name
        assert estimate["low"] <= estimate["high"]


def test_rare_classes_are_drawn_more_often_where_images_have_several(tmp_path):
    root = write_tagged(tmp_path / "x", {"train": ["blue"] * 14 + ["blue|red", ""], "val": ["red"], "test": [""]})
    data = attach(module(root, imbalance="balanced_sampling"), TrainerFn.FITTING)
    drawn = np.concatenate([batch["target"].numpy() for batch in data.train_dataloader()])
    kinds = {tuple(row): int((drawn == row).all(axis=1).sum()) for row in ([1, 0], [1, 1], [0, 0])}
    assert all(4 <= count <= 7 for count in kinds.values()), kinds


@pytest.mark.slow
def test_two_processes_that_hold_unequally_many_images_validate_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {split: drawn_labels(count, CHANCES, count) for split, count in (("train", 24), ("val", 13), ("test", 9))}
    root = write_tagged(tmp_path / "images", labels)
    monkeypatch.chdir(tmp_path)
    done = in_processes("fit", *DATA, *fast(root), *TWO, "--trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    (folder,) = Path("runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    client = MlflowClient(summary["tracking_uri"], summary["tracking_uri"])
    for name in ("accuracy", "macro_f1", "mean_average_precision"):
        (point,) = client.get_metric_history(summary["run_id"], f"val/{name}")
        assert summary["metrics"][f"val/{name}"]["value"] == pytest.approx(point.value, abs=1e-6), name
        assert summary["metrics"][f"val/{name}"]["n"] == 13
