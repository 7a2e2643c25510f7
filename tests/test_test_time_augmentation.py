"""The mean over mirrored views: in the task, in evaluation, in the checkpoint and in the registered model."""

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import horizontal_flip, vertical_flip

from datamodules.decode import decode
from pipeline.cli import main
from pipeline.evaluation.calibration import temper
from pipeline.registry.bundle import write_bundle
from pipeline.registry.inference import Bundle
from pipeline.task import ClassificationTask
from tests.images import RECORD, encoded, preprocessing, smooth
from tests.support import fast, write_images

VIEWS = {
    "none": [lambda image: image],
    "flip": [lambda image: image, horizontal_flip],
    "flips": [
        lambda image: image,
        horizontal_flip,
        vertical_flip,
        lambda image: horizontal_flip(vertical_flip(image)),
    ],
}
LARGEST = {"uint8": 255, "uint16": 65535, "float32": 1.0}


def task(views: str, **settings: Any) -> ClassificationTask:
    torch.manual_seed(0)
    record = settings.pop("preprocessing", RECORD)
    made = ClassificationTask(["a", "b", "c"], record, "resnet20", test_time_augmentation=views, **settings)
    head = made.network.get_submodule(made.head)
    torch.nn.init.normal_(head.weight, std=0.5)  # a fresh head gives nearly the same probabilities to everything
    return made.eval()


def pictures(count: int = 3) -> np.ndarray:
    """Float64 in [0, 1] of shape (N, 32, 32, 3), that look different when mirrored."""
    return np.stack([smooth(32, 32, phase) for phase in np.arange(count)]) / 255


def as_input(values: np.ndarray, dtype: str) -> Tensor:
    scaled = values * LARGEST[dtype]
    return torch.from_numpy((scaled.round() if dtype != "float32" else scaled).astype(dtype)).permute(0, 3, 1, 2)


# The task


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("views", VIEWS)
def test_the_answer_is_the_mean_of_the_views_probabilities(views: str, multi_label: bool) -> None:
    made, images = task(views, multi_label=multi_label), as_input(pictures(), "uint8")
    with torch.inference_mode():
        logits = [made(view(images)) for view in VIEWS[views]]
        each = [torch.sigmoid(out) if multi_label else torch.softmax(out, dim=1) for out in logits]
        answer = made.answer(images).probabilities
    assert len(each) == 1 or (each[0] - each[1]).abs().max() > 1e-3, "the views look alike"
    torch.testing.assert_close(answer, sum(each) / len(each))


def test_without_views_the_answer_is_the_network_s() -> None:
    made, images = task("none"), as_input(pictures(), "uint8")
    batch = {"image": images, "target": torch.tensor([0, 1, 2]), "index": torch.arange(3)}
    with torch.inference_mode():
        expected = torch.softmax(made(images), dim=1)
        torch.testing.assert_close(made.answer(images).probabilities, expected, atol=1e-6, rtol=1e-5)
        for step in (made.test_step, made.predict_step):
            torch.testing.assert_close(step(batch, 0)["probabilities"], expected, atol=1e-6, rtol=1e-5)


def test_the_answer_does_not_change_when_the_image_is_mirrored() -> None:
    images = as_input(pictures(), "uint8")
    with torch.inference_mode():
        flip, flips = task("flip"), task("flips")
        as_it_is, twice = flip.answer(images).probabilities, flips.answer(images).probabilities
        torch.testing.assert_close(flip.answer(horizontal_flip(images)).probabilities, as_it_is)
        assert (flip.answer(vertical_flip(images)).probabilities - as_it_is).abs().max() > 1e-3
        torch.testing.assert_close(flips.answer(vertical_flip(images)).probabilities, twice)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_training_sees_one_view_and_evaluation_all() -> None:
    made, images = task("flips"), as_input(pictures(), "uint8")
    seen: list[int] = []
    made.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    made.setup("fit")
    batch = {"image": images, "target": torch.tensor([0, 1, 2]), "index": torch.arange(3)}
    made.training_step(batch, 0)
    assert seen == [3]
    with torch.inference_mode():
        for step in (made.validation_step, made.test_step, made.predict_step):
            seen.clear()
            outputs = step(batch, 0)
            assert sum(seen) == 12
            torch.testing.assert_close(outputs["probabilities"], made.answer(images).probabilities)


@pytest.mark.parametrize("dtype", LARGEST)
def test_values_are_scaled_by_their_type(dtype: str) -> None:
    mean, std = torch.tensor(RECORD["mean"]), torch.tensor(RECORD["std"])
    expected = (torch.from_numpy(pictures()).float() - mean) / std
    found = task("none").normalise(as_input(pictures(), dtype))
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected.permute(0, 3, 1, 2), rtol=0, atol=1e-4 if dtype == "uint8" else 1e-5)


# The registered model


@pytest.mark.parametrize(
    ("views", "multi_label"), [pytest.param("flip", False, marks=pytest.mark.slow), ("flips", True)]
)
def test_the_bundle_averages_the_same_views(tmp_path: Path, views: str, multi_label: bool) -> None:
    made = task(views, multi_label=multi_label)
    write_bundle(tmp_path, made, {})
    files = [encoded(Image.fromarray(smooth(52, 63, phase)), "PNG") for phase in (0.0, 1.5, 3.0)]
    fitted = np.stack([preprocessing().fit_to_size(decode(file)).transpose(2, 0, 1) for file in files])
    with torch.inference_mode():
        expected = made.answer(torch.from_numpy(fitted)).probabilities.numpy()
    bundle = Bundle(tmp_path)
    assert bundle.multi_label == multi_label
    for count in (3, 1):
        np.testing.assert_allclose(bundle.predict(files[:count]).probabilities, expected[:count], atol=1e-5)


@pytest.mark.parametrize(("views", "dtype"), [("flips", "uint16"), ("flip", "float32")])
def test_the_graph_takes_other_types_of_images(tmp_path: Path, views: str, dtype: str) -> None:
    made = task(views, preprocessing={**RECORD, "dtype": dtype})
    write_bundle(tmp_path, made, {})
    images = as_input(pictures(), dtype)
    with torch.inference_mode():
        expected = made.answer(images).probabilities.numpy()
    (found,) = Bundle(tmp_path)._session.run(["probabilities"], {"image": images.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-5)


# From start to end


class Run:
    """A finished ``fit`` with all views."""

    def __init__(self, home: Path) -> None:
        self.images = home / "images"
        write_images(self.images, per_class=12)
        arguments = [*fast(self.images), "--trainer.max_epochs=1", "--model.backbone=resnet20"]
        with contextlib.chdir(home), (home / "out.txt").open("w") as out, contextlib.redirect_stdout(out):
            assert main(["fit", *arguments, "--model.test_time_augmentation=flips", "--registered_model_name=x"]) == 0
        self.shown = (home / "out.txt").read_text()
        (self.folder,) = (home / "runs").iterdir()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def test_the_run_says_so_and_registers(run: Run) -> None:
    assert "views      flips: an image's probabilities are the mean of 4 views" in run.shown
    assert json.loads((run.folder / "summary.json").read_text())["registered"] == {"name": "x", "version": "1"}


def test_the_checkpoint_keeps_it(run: Run, tmp_path: Path) -> None:
    made = ClassificationTask.load_from_checkpoint(run.folder / "best.ckpt", map_location="cpu", weights_only=True)
    assert made.hparams["test_time_augmentation"] == "flips"
    output = tmp_path / "out.csv"
    arguments = [*fast(run.images), f"--ckpt_path={run.folder}", f"--output={output}"]
    assert main(["test", *arguments]) == 0  # without the run's configuration
    assert output.read_text() == (run.folder / "predictions.csv").read_text()


def test_who_evaluates_chooses_the_views(run: Run, tmp_path: Path) -> None:
    for views in ("none", "flips"):
        output = tmp_path / f"{views}.csv"
        arguments = [*fast(run.images), f"--ckpt_path={run.folder}", f"--output={output}"]
        assert main(["test", *arguments, f"--model.test_time_augmentation={views}"]) == 0
    assert (tmp_path / "flips.csv").read_text() == (run.folder / "predictions.csv").read_text()
    assert (tmp_path / "none.csv").read_text() != (run.folder / "predictions.csv").read_text()


def test_predictions_of_test_are_those_of_the_views(run: Run) -> None:
    made = ClassificationTask.load_from_checkpoint(run.folder / "best.ckpt", map_location="cpu", weights_only=True)
    with (run.folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    record = preprocessing(**made.hparams["preprocessing"])
    fitted = [record.fit_to_size(decode((run.images / row["path"]).read_bytes())) for row in rows]
    images = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        each = [torch.softmax(made.eval()(view(images)), dim=1) for view in VIEWS["flips"]]
    expected = temper(sum(each) / 4, float(made.temperature), multi_label=False).numpy()
    found = np.array([[float(row[f"p_{name}"]) for name in ("blue", "green", "red")] for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - each[0].numpy()).max() > 1e-4
