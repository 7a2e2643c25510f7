"""``python -m pipeline register``: what is registered, that it is proven first, and that a failure leaves nothing."""

import base64
import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image

from pipeline import fitting, registering
from pipeline.cli import main
from pipeline.outcome import Evaluated
from pipeline.registry import register as registry
from pipeline.registry.inference import Bundle
from tests.registered import Run, frame
from tests.support import fast, write_images

NOT_GOLDEN = 8  # of 18 test images, which 16 samples are spread over


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module", autouse=True)
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A model that is registered again is not exported again, which takes seconds."""
    graphs, export = tmp_path_factory.mktemp("graphs"), torch.onnx.export

    def once(answers: torch.nn.Module, images: object, file: str, **settings: Any) -> None:
        content = io.BytesIO()
        torch.save(answers.state_dict(), content)
        kept = graphs / hashlib.sha256(content.getvalue()).hexdigest()
        if not kept.exists():
            export(answers, images, file, **settings)
            shutil.copy(file, kept)
        shutil.copy(kept, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", once)
        yield


@pytest.fixture(scope="module")
def registered(run: Run) -> Run:
    assert run.register("colours", "--threshold=0.6") == 0
    return run


@pytest.fixture(scope="module")
def model(registered: Run) -> Any:
    return registered.load("colours")


@pytest.fixture(scope="module")
def bundle(registered: Run) -> Path:
    mlflow.set_tracking_uri(registered.uri)
    try:
        return Path(mlflow.artifacts.download_artifacts("models:/colours@challenger")) / "artifacts" / "bundle"
    finally:
        mlflow.set_tracking_uri(None)


# What is registered


def test_the_version_belongs_to_its_run_which_is_as_it_was(registered: Run) -> None:
    version = registered.client.get_model_version_by_alias("colours", "challenger")
    assert version.run_id == registered.summary["run_id"]
    (tracked,) = registered.client.search_runs([registered.summary["experiment_id"]])
    assert tracked.info.status == "FINISHED"
    assert version.source in [f"models:/{output.model_id}" for output in tracked.outputs.model_outputs]


def test_the_bundle_says_where_it_comes_from(registered: Run, bundle: Path) -> None:
    content = json.loads((bundle / "bundle.json").read_text())
    assert content["classes"] == ["blue", "green", "red"]
    assert content["threshold"] == 0.6
    assert content["calibration"]["temperature"] == pytest.approx(registered.summary["temperature"], abs=1e-4)
    assert content["weights"] == {"address": "scratch", "origin": "scratch", "licence": None}
    assert content["data"]["digest"] == registered.summary["tags"]["data_digest"]
    assert content["data"]["test_images"] == 18
    assert content["run_id"] == registered.summary["run_id"]
    assert content["tags"]["code_revision"] == registered.summary["tags"]["code_revision"]
    assert content["metrics"]["test/accuracy"] == registered.summary["metrics"]["test/accuracy"]
    assert content["versions"]["onnxruntime"]
    proven = registered.client.get_model_version_by_alias("colours", "challenger").tags["proven_on"]
    assert content["data"]["test_digest"] == proven


def test_the_bundle_has_every_test_image_by_its_content(registered: Run, bundle: Path) -> None:
    with (bundle / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [row["path"] for row in registered.tested]
    for row in rows:
        assert row["sha256"] == hashlib.sha256((registered.images / row["path"]).read_bytes()).hexdigest()


def test_the_golden_samples_are_test_images_with_their_answers(registered: Run, bundle: Path) -> None:
    images, expected = Bundle(bundle).golden_samples()
    assert len(images) == 16
    by_content = {(registered.images / row["path"]).read_bytes(): row for row in registered.tested}
    for image, answer in zip(images, expected, strict=True):
        row = by_content[image]
        np.testing.assert_allclose(answer, [float(row[f"p_{name}"]) for name in ("blue", "green", "red")], atol=1e-7)


def test_the_model_card_has_data_metrics_with_intervals_licence_and_limits(registered: Run, bundle: Path) -> None:
    card = (bundle / "MODEL_CARD.md").read_text()
    metric = registered.summary["metrics"]["test/accuracy"]
    assert f"| test/accuracy | {metric['value']:.4f} | {metric['low']:.4f} to {metric['high']:.4f} | 18 |" in card
    assert "licence of those weights: not stated" in card
    assert "| red | 6 |" in card
    assert registered.summary["tags"]["data_digest"] in card
    assert "## Limits" in card
    assert "No label is given where the score is below 0.6" in card


def test_the_page_of_the_version_shows_the_model_card(registered: Run, bundle: Path) -> None:
    version = registered.client.get_model_version_by_alias("colours", "challenger")
    assert version.description == (bundle / "MODEL_CARD.md").read_text()


def test_a_long_model_card_is_shortened_where_the_registry_keeps_little() -> None:
    shown = registry._shortened("| row |\n" * 1_000)
    assert 4_900 < len(shown) <= 5_000
    assert shown.endswith("| row |\n\n(The rest is in the version's MODEL_CARD.md.)\n")


def test_signature_input_example_and_pinned_requirements_are_there(model: Any, bundle: Path) -> None:
    metadata = model.metadata
    assert metadata.signature.inputs.to_dict() == [{"type": "binary", "name": "image", "required": True}]
    assert [param.name for param in metadata.get_params_schema()] == ["top_k"]
    assert metadata.saved_input_example_info is not None
    lines = (bundle.parents[1] / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in lines} == {"mlflow", "numpy", "pandas", "pillow", "onnxruntime"}
    assert all("==" in line for line in lines)


# What it answers


def test_below_the_threshold_no_label_is_given(registered: Run, model: Any) -> None:
    answer = model.predict(frame([registered.images / row["path"] for row in registered.tested]))
    sure = answer["score"] >= 0.6
    assert not sure.all()
    assert set(answer["label"][~sure]) == {""}
    assert set(answer["label_id"][~sure]) == {-1}
    assert list(answer["label"][sure]) == [
        row["label"] for row, kept in zip(registered.tested, sure, strict=True) if kept
    ]


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_most_probable_classes_come_in_order(registered: Run, model: Any, top_k: int) -> None:
    row = registered.tested[0]
    answer = model.predict(frame([registered.images / row["path"]]), params={"top_k": top_k})
    ranked = sorted(("blue", "green", "red"), key=lambda name: -float(row[f"p_{name}"]))
    assert answer["top_labels"][0] == ranked[:top_k]
    np.testing.assert_allclose(answer["top_scores"][0], [float(row[f"p_{n}"]) for n in ranked[:top_k]], atol=1e-4)


@pytest.mark.parametrize("top_k", [-1, 4])
def test_more_classes_than_there_are_cannot_be_asked_for(registered: Run, model: Any, top_k: int) -> None:
    with pytest.raises(MlflowException, match=f"top_k: expected 0 to 3, the number of classes, found {top_k}"):
        model.predict(frame([registered.images / registered.tested[0]["path"]]), params={"top_k": top_k})


def test_images_come_in_json_as_base64(registered: Run, model: Any) -> None:
    row = registered.tested[0]
    image = base64.b64encode((registered.images / row["path"]).read_bytes()).decode()
    request = json.dumps({"dataframe_split": {"columns": ["image"], "data": [[image]]}, "params": {"top_k": 1}})
    schema = model.metadata.get_input_schema()
    answered = scoring_server.invocations(request, "application/json", model, schema)
    assert answered.status == 200
    (answer,) = json.loads(answered.response)["predictions"]
    assert answer["score"] == pytest.approx(float(row["score"]), abs=1e-4)
    assert len(answer["top_labels"]) == 1


def test_arrays_are_answered_as_files_are(registered: Run, model: Any) -> None:
    paths = [registered.images / row["path"] for row in registered.tested[:5]]
    arrays = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    answer = model.unwrap_python_model().predict_arrays(arrays, top_k=2)
    expected = model.predict(frame(paths), params={"top_k": 2})
    assert list(answer["label"]) == list(expected["label"])
    np.testing.assert_allclose(np.stack(answer["probabilities"]), np.stack(expected["probabilities"]), atol=1e-6)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 40, 40), np.uint8),
        np.zeros((2, 3, 40, 40), np.uint8),
        np.zeros((2, 40, 40, 3), np.float32),
        np.zeros((2, 0, 40, 3), np.uint8),
    ],
    ids=["grey", "channels first", "floats", "empty"],
)
def test_arrays_of_another_kind_are_refused(model: Any, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected images \(N, H, W, 3\) of uint8, found"):
        model.unwrap_python_model().predict_arrays(images)


def test_a_row_that_is_no_image_is_named(registered: Run, model: Any) -> None:
    rows = [(registered.images / registered.tested[0]["path"]).read_bytes(), b"nonsense"]
    with pytest.raises(MlflowException, match="row 1: expected the bytes of an encoded image"):
        model.predict(pd.DataFrame({"image": rows}))


def test_with_too_few_held_out_nothing_is_said_of_familiarity(registered: Run, model: Any, tmp_path: Path) -> None:
    assert "familiarity" not in registered.tested[0]  # 13 images are held out
    assert "familiarity" not in model.predict(frame([registered.images / registered.tested[0]["path"]]))
    output = tmp_path / "parts"
    images = [f"--ckpt_path={registered.checkpoint}", f"--data.predict_path={registered.images}"]
    assert main(["predict", *images, f"--output={output}", "--data.num_workers=0"]) == 0
    assert pq.read_table(output)["familiarity"].null_count == 90


# From where


def test_a_run_is_registered_from_the_store_without_its_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"--run={run.summary['run_id']}", f"--tracking_uri={run.uri}"]
    assert main(["register", "--name=fetched", *arguments]) == 0
    assert "models:/fetched@challenger  (version 1)" in capsys.readouterr().out
    version = run.client.get_model_version_by_alias("fetched", "challenger")
    assert version.run_id == run.summary["run_id"]


# What fails


def shaken(evaluated: Evaluated) -> Evaluated:
    """One answer differs a little, of an image that is no golden sample."""
    probabilities = evaluated.predictions.probabilities.copy()
    probabilities[NOT_GOLDEN] += [1e-3, -5e-4, -5e-4]
    return replace(evaluated, predictions=replace(evaluated.predictions, probabilities=probabilities))


def disagree_on_one_image(patch: pytest.MonkeyPatch) -> None:
    real = registering.evaluate
    patch.setattr(registering, "evaluate", lambda *arguments: shaken(real(*arguments)))


def need_the_training(patch: pytest.MonkeyPatch) -> None:
    real = registry.write_bundle

    def write(folder: Path, *arguments: Any) -> None:
        real(folder, *arguments)
        with (folder / "decode.py").open("a") as file:
            file.write("\nimport torch\n")

    patch.setattr(registry, "write_bundle", write)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (disagree_on_one_image, "disagrees with the test by up to 0.001 in probability"),
        (need_the_training, "No module named 'torch' where the model is to answer"),
    ],
)
def test_a_version_that_fails_its_proof_is_not_left_behind(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[pytest.MonkeyPatch], None],
    words: str,
) -> None:
    logged = run.logged_models
    spoil(monkeypatch)
    assert run.register("spoilt") == 1
    assert words in capsys.readouterr().err
    assert [found.name for found in run.client.search_registered_models() if found.name == "spoilt"] == []
    assert run.logged_models == logged


def test_a_failure_leaves_what_was_registered_before(
    registered: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = registered.client.get_model_version_by_alias("colours", "challenger").version
    real = registry.write_golden_samples
    monkeypatch.setattr(registry, "write_golden_samples", lambda f, images, answers: real(f, images[::-1], answers))
    assert registered.register("colours") == 1
    assert "golden samples, disagrees" in capsys.readouterr().err
    assert registered.client.get_model_version_by_alias("colours", "challenger").version == before
    assert len(registered.client.search_model_versions("name='colours'")) == 1


def test_a_run_whose_model_cannot_be_registered_has_all_the_same_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("it disagrees")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "register", fail)
    write_images(tmp_path / "images", per_class=10)
    arguments = [*fast(tmp_path / "images"), "--trainer.max_epochs=1"]
    assert main(["fit", *arguments, "--registered_model_name=colours"]) == 1
    (folder,) = Path("runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["registered"] is None
    assert "test/accuracy" in summary["metrics"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["register", "--name=colours", f"--checkpoint={folder / 'best.ckpt'}"]) == 0


def test_what_disagrees_at_once_is_not_even_logged(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = run.logged_models
    monkeypatch.setattr(registry, "_served", lambda bundle, images: np.full((len(images), 3), 1 / 3))
    assert run.register("spoilt") == 1
    assert run.logged_models == logged


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name=a/b", "--checkpoint=x"], "--name: expected a name without '/' and ':', found 'a/b'"),
        (["--name=x"], "one of the arguments --run --checkpoint is required"),
        (["--name=x", "--checkpoint=nowhere.ckpt"], "--checkpoint: expected a file, found nothing at 'nowhere.ckpt'"),
        (["--name=x", "--checkpoint=x", "--threshold=1.5"], "--threshold: expected a score above 0 and at most 1"),
        (["--name=x", "--run=abc"], "tracking_uri: expected a store that runs were tracked in, found none at"),
        (["--name=x", "--run=abc", "--tracking_uri={uri}"], "--run: expected the id of a run"),
    ],
)
def test_a_wrong_call_is_one_clear_error(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["register", *(argument.format(uri=run.uri) for argument in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_a_checkpoint_of_no_tracked_run_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "best.ckpt"
    copy.write_bytes(run.checkpoint.read_bytes())
    assert main(["register", "--name=x", f"--checkpoint={copy}"]) == 2
    assert "expected a checkpoint in the folder of a tracked run" in capsys.readouterr().err


def test_an_image_that_changed_since_is_noticed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.images / run.tested[0]["path"]
    before = path.read_bytes()
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    try:
        assert run.register("changed") == 2
    finally:
        path.write_bytes(before)
    assert "expected the images and the split that the checkpoint was trained with" in capsys.readouterr().err
