"""One small run from start to end, and everything that must agree with it."""

import contextlib
import csv
import json
import os
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient

from pipeline.cli import main
from pipeline.registry.inference import Bundle
from pipeline.task import ClassificationTask
from tests.support import fast, write_images


class Run:
    """A finished ``fit`` in a folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.images = home / "images"
        write_images(self.images, per_class=15)
        arguments = ["fit", *fast(self.images), "--trainer.max_epochs=2", "--registered_model_name=colours"]
        arguments.append("--model.backbone=resnet18")
        with contextlib.chdir(home):
            assert main(arguments) == 0
        (self.folder,) = (home / "runs").iterdir()
        self.summary = json.loads((self.folder / "summary.json").read_text())
        self.client = MlflowClient(self.summary["tracking_uri"], self.summary["tracking_uri"])

    def rows(self, path: Path) -> list[dict[str, str]]:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def probabilities(rows: list[dict[str, str]]) -> np.ndarray:
    return np.array([[float(row[f"p_{name}"]) for name in ("blue", "green", "red")] for row in rows])


def test_the_run_folder_has_what_was_promised(run: Run) -> None:
    files = "best.ckpt last.ckpt config.yaml plan.json split.csv predictions.csv summary.json run.json"
    tracking = "journal.jsonl journal.sent.json journal.lock confusion_matrix.png metrics.json"
    assert {path.name for path in run.folder.iterdir()} == {*files.split(), *tracking.split()}


def test_summary_has_intervals_counts_and_where_to_find_things(run: Run) -> None:
    summary = run.summary
    assert summary["classes"] == ["blue", "green", "red"]
    for name in ("test/accuracy", "test/macro_f1", "test/log_loss", "val/accuracy"):
        metric = summary["metrics"][name]
        assert metric["low"] <= metric["value"] <= metric["high"]
        assert metric["n"] == (9 if name.startswith("test") else 6)
    assert summary["registered"] == {"name": "colours", "version": "1"}
    assert summary["tracking_uri"] == f"sqlite:///{run.home}/mlflow.db"
    assert Path(summary["checkpoint"]) == run.folder / "best.ckpt"
    assert summary["wall_seconds"] > 0
    assert summary["images_per_second"] > 0
    assert summary["tags"]["weights"] == "scratch"


def test_predictions_give_the_reported_accuracy(run: Run) -> None:
    rows = run.rows(run.folder / "predictions.csv")
    held_out = [row["path"] for row in run.rows(run.folder / "split.csv") if row["split"] == "test"]
    assert [row["path"] for row in rows] == held_out
    assert np.mean([row["target"] == row["label"] for row in rows]) == run.summary["metrics"]["test/accuracy"]["value"]
    np.testing.assert_allclose(probabilities(rows).sum(axis=1), 1, atol=3e-6)


def test_the_tracked_run_is_complete(run: Run) -> None:
    (tracked,) = run.client.search_runs([run.summary["experiment_id"]])
    assert tracked.info.run_id == run.summary["run_id"]
    assert tracked.info.status == "FINISHED"
    assert tracked.info.run_name == run.folder.name
    assert tracked.data.params["trainer.max_epochs"] == "2"
    assert tracked.data.params["model.backbone"] == "resnet18"
    assert tracked.data.tags["weights"] == "scratch"
    assert tracked.data.metrics["test/accuracy"] == run.summary["metrics"]["test/accuracy"]["value"]
    assert len(run.client.get_metric_history(tracked.info.run_id, "val/loss")) == 2
    artifacts = {item.path for item in run.client.list_artifacts(tracked.info.run_id)}
    expected = {"config.yaml", "split.csv", "predictions.csv", "confusion_matrix.png", "summary.json", "checkpoints"}
    assert expected <= artifacts
    (dataset,) = tracked.inputs.dataset_inputs
    assert run.summary["tags"]["data_digest"].startswith(dataset.dataset.digest)


def test_the_tracked_checkpoint_is_the_best_one(run: Run, tmp_path: Path) -> None:
    copy = run.client.download_artifacts(run.summary["run_id"], "checkpoints/best.ckpt", str(tmp_path))
    assert Path(copy).read_bytes() == (run.folder / "best.ckpt").read_bytes()


def test_test_repeats_the_numbers_of_fit(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "again.csv"
    checkpoint = run.folder / "best.ckpt"
    arguments = [f"--config={run.folder / 'config.yaml'}", f"--ckpt_path={checkpoint}", f"--output={output}"]
    assert main(["test", *arguments]) == 0
    assert output.read_text() == (run.folder / "predictions.csv").read_text()
    assert f"accuracy  {run.summary['metrics']['test/accuracy']['value']:.4f}" in capsys.readouterr().out


def test_validate_repeats_the_numbers_of_fit(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", f"--config={run.folder / 'config.yaml'}", f"--ckpt_path={run.folder}"]) == 0
    shown = capsys.readouterr().out
    for name, label in (("accuracy", "accuracy"), ("macro_f1", "macro F1"), ("log_loss", "log loss")):
        assert f"{label:<9} {run.summary['metrics'][f'val/{name}']['value']:.4f}" in shown
    best = max(item.value for item in run.client.get_metric_history(run.summary["run_id"], "val/accuracy"))
    assert run.summary["metrics"]["val/accuracy"]["value"] == pytest.approx(best, abs=1e-6)


def test_predict_reads_a_folder_without_labels(run: Run, tmp_path: Path) -> None:
    flat = tmp_path / "unlabelled" / "deep"
    flat.mkdir(parents=True)
    tested = run.rows(run.folder / "predictions.csv")
    for number, row in enumerate(tested):
        (flat / f"{number:03}.png").write_bytes((run.images / row["path"]).read_bytes())
    output = tmp_path / "out.csv"
    arguments = [f"--ckpt_path={run.folder}", f"--data.predict_path={flat.parent}", f"--output={output}"]
    assert main(["predict", *arguments, "--data.num_workers=0"]) == 0
    rows = run.rows(output)
    assert list(rows[0]) == ["path", "label", "score", "p_blue", "p_green", "p_red"]
    assert [row["path"] for row in rows] == [f"deep/{number:03}.png" for number in range(len(tested))]
    assert [row["label"] for row in rows] == [row["label"] for row in tested]
    np.testing.assert_allclose(probabilities(rows), probabilities(tested), atol=1e-6)


def test_the_registered_model_sees_what_test_saw(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(run.summary["tracking_uri"])
    try:
        model = mlflow.pyfunc.load_model("models:/colours@challenger")
    finally:
        mlflow.set_tracking_uri(None)
    tested = run.rows(run.folder / "predictions.csv")
    answer = model.predict(pd.DataFrame({"image": [(run.images / row["path"]).read_bytes() for row in tested]}))
    assert list(answer["label"]) == [row["label"] for row in tested]
    assert [run.summary["classes"][i] for i in answer["label_id"]] == list(answer["label"])
    np.testing.assert_allclose(np.stack(answer["probabilities"]), probabilities(tested), atol=1e-4)
    np.testing.assert_allclose(answer["score"], probabilities(tested).max(axis=1), atol=1e-4)
    assert not list(tmp_path.iterdir())  # asking leaves nothing behind


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (b"nonsense", "8 bytes that cannot be read"),
        (b"", "0 bytes that cannot be read"),
        ("a/path.png", "str"),
        (None, "NoneType"),
    ],
)
def test_the_bundle_refuses_what_is_no_image_and_names_the_row(run: Run, image: object, expected: str) -> None:
    bundle = Bundle(next(run.home.glob("mlruns/**/bundle")))
    good = next(run.images.rglob("*.png")).read_bytes()
    with pytest.raises(ValueError, match=f"row 1: expected the bytes of an encoded image, found {expected}"):
        bundle.predict([good, image])  # type: ignore[list-item]


def test_registering_leaves_no_address_behind(run: Run) -> None:
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert "MLFLOW_REGISTRY_URI" not in os.environ


def test_the_registered_version_belongs_to_the_run(run: Run) -> None:
    version = run.client.get_model_version_by_alias("colours", "challenger")
    assert str(version.version) == "1"
    assert version.run_id == run.summary["run_id"]


def test_the_checkpoint_holds_plain_values_and_loads_by_itself(run: Run) -> None:
    content = torch.load(run.folder / "best.ckpt", weights_only=True)
    assert content["hyper_parameters"]["classes"] == ["blue", "green", "red"]
    task = ClassificationTask.load_from_checkpoint(run.folder / "best.ckpt", map_location="cpu", weights_only=True)
    assert task.classes == ["blue", "green", "red"]
    assert task.hparams["preprocessing"]["size"] == 32


def test_the_saved_configuration_is_resolved_and_can_be_used(run: Run) -> None:
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 2
    assert config["data"]["init_args"]["root"] == str(run.images)
    assert "classes" not in config["model"]  # follows from the data


def test_testing_on_images_that_were_trained_on_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--config={run.folder / 'config.yaml'}", f"--ckpt_path={run.folder}", "--data.split_seed=1"]
    assert main(["test", *arguments]) == 2
    assert "expected the images and the split that the checkpoint was trained with" in capsys.readouterr().err


def test_another_seed_keeps_the_held_out_images(run: Run) -> None:
    arguments = [f"--config={run.folder / 'config.yaml'}", f"--ckpt_path={run.folder}", "--seed_everything=7"]
    assert main(["test", *arguments]) == 0
