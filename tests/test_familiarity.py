"""Familiar and strange images: what is said of them, that it is said wherever a model answers, and the same there."""

import csv
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from pipeline import finishing
from pipeline.cli import main
from pipeline.evaluation.familiarity import STRANGE, Familiarity
from pipeline.evaluation.predictions import Predictions
from pipeline.models import backbones
from pipeline.models.backbones import create_backbone, describe
from pipeline.registry.proof import require_familiarity
from tests.registered import Run, frame
from tests.support import fast, pretrained

HELD_OUT = "--data.val_fraction=0.3"  # of 90 images, 27


def drawn(count: int, widths: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.manual_seed(seed)
    return [torch.randn(count, width, generator=generator) + 1 for width in widths]


# The measure


def test_it_is_the_share_of_held_out_images_that_are_no_nearer() -> None:
    trained, held_out, asked = (drawn(count, (5, 9), seed) for count, seed in ((40, 1), (30, 2), (6, 3)))

    def distances(stages: list[Tensor]) -> np.ndarray:
        rows = []
        for ours, theirs in zip(stages, trained, strict=True):
            a, b = ours.double().numpy(), theirs.double().numpy()
            cosines = (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
            rows.append((1 - cosines).min(axis=1))
        return np.array(rows)

    usual = distances(held_out)
    centre, spread = usual.mean(axis=1, keepdims=True), usual.std(axis=1, ddof=1, keepdims=True)
    usual, found = (((of - centre) / spread).sum(axis=0) for of in (usual, distances(asked)))
    expected = [(1 + np.sum(usual >= strangeness)) / 31 for strangeness in found]
    made = Familiarity.measured(trained, held_out)
    np.testing.assert_allclose(made(asked).numpy(), expected, atol=1e-6)
    assert made.step == pytest.approx(1 / 31)


def test_images_of_the_same_kind_seem_strange_no_more_often_than_is_said() -> None:
    shares = []
    for seed in range(20):
        made = Familiarity.measured(drawn(50, (8,), 3 * seed), drawn(99, (8,), 3 * seed + 1))
        shares.append((made(drawn(400, (8,), 3 * seed + 2)) < STRANGE).float().mean().item())
    # Each mean of 20 shares has a standard error of some 0.005.
    assert 0.03 < np.mean(shares) < 0.065


def test_what_lies_elsewhere_is_strange() -> None:
    made = Familiarity.measured(drawn(50, (8, 16), 0), drawn(99, (8, 16), 1))
    elsewhere = [-stage for stage in drawn(20, (8, 16), 2)]
    assert (made(elsewhere) == made.step).all()


def test_images_that_are_all_alike_are_familiar_to_themselves() -> None:
    same = [torch.ones(25, 4)]
    made = Familiarity.measured(same, same)
    assert made([torch.ones(1, 4)]).item() == 1.0
    assert made([torch.tensor([[1.0, -1.0, 1.0, -1.0]])]).item() == pytest.approx(made.step)


def test_it_comes_back_from_a_file_that_runs_no_code(tmp_path: Path) -> None:
    made, asked = Familiarity.measured(drawn(9, (3, 4), 0), drawn(21, (3, 4), 1)), drawn(5, (3, 4), 2)
    torch.save(made.to_state(), tmp_path / "state")
    again = Familiarity(**torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(again(asked), made(asked))


# What it is measured on


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50d", "resnet20", "timm/convnext_atto", "timm/vit_tiny_patch16_224"]
)
def test_a_description_comes_with_the_networks_own_logits(name: str) -> None:
    size = 224 if "vit" in name else 64
    network, images = create_backbone(name, 5).eval(), torch.randn(2, 3, size, size)
    with torch.inference_mode():
        logits, stages = describe(network, images)
        torch.testing.assert_close(logits, network(images), rtol=0, atol=1e-6)
    assert [stage.shape[0] for stage in stages] == [2, 2, 2]
    assert all(stage.ndim == 2 for stage in stages)


def test_our_stages_are_timms() -> None:
    theirs, images = timm.create_model("resnet18", num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    ours = create_backbone("resnet18", 10).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.inference_mode():
        _, expected = theirs.forward_intermediates(images, indices=3)
        for stage, maps in zip(describe(ours, images)[1], expected, strict=True):
            torch.testing.assert_close(stage, maps.mean((2, 3)), rtol=0, atol=1e-5)


def test_a_network_that_does_not_tell_its_stages_is_described_by_its_features() -> None:
    network = create_backbone("resnet18", 10).eval()

    class Untold(torch.nn.Module):
        forward_features, forward_head = network.forward_features, network.forward_head

    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits, (features,) = describe(Untold(), images)
        assert torch.equal(logits, network(images))
        assert torch.equal(features, backbones.features(network, images))


# Wherever a model answers


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"), HELD_OUT)


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Black and white stripes, where all others are noisy colours."""
    folder = tmp_path_factory.mktemp("strange")
    for number in range(6):
        lines = np.tile((np.arange(40) // (number + 2) % 2 * 255).astype(np.uint8), (40, 1))
        Image.fromarray(np.stack([lines] * 3, axis=2)).save(folder / f"{number}.png")
    return folder


def familiarity_of(rows: list[dict[str, Any]]) -> list[float]:
    return [float(row["familiarity"]) for row in rows]


def test_each_tested_image_has_one(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    tested = familiarity_of(run.tested)
    assert len(tested) == 18
    assert all(0 < each <= 1 for each in tested)
    assert main(["test", f"--config={run.folder / 'config.yaml'}", f"--ckpt_path={run.checkpoint}"]) == 0
    few = sum(each < STRANGE for each in tested)
    shown = f"strange   {few / 18:.4f}   {few} look less like the training images than 95% of those held out do"
    assert shown in capsys.readouterr().out


def test_strange_images_are_found_strange_in_a_table_and_in_parts(run: Run, strange: Path, tmp_path: Path) -> None:
    command = ["predict", f"--ckpt_path={run.checkpoint}", f"--data.predict_path={strange}", "--data.num_workers=0"]
    assert main([*command, f"--output={tmp_path / 'table.csv'}"]) == 0
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert max(familiarity_of(rows)) < STRANGE
    assert main([*command, f"--output={tmp_path / 'parts'}"]) == 0
    in_parts = familiarity_of(pq.read_table(tmp_path / "parts").to_pylist())
    np.testing.assert_allclose(in_parts, familiarity_of(rows), atol=1e-4)


def test_the_registered_model_says_the_same(run: Run, strange: Path) -> None:
    assert run.register("colours") == 0
    model = run.load("colours")
    assert "familiarity" in model.metadata.signature.outputs.input_names()
    answer = model.predict(frame([run.images / row["path"] for row in run.tested]))
    # Rounding may carry a distance past one of 27 held-out images.
    np.testing.assert_allclose(answer["familiarity"], familiarity_of(run.tested), atol=1 / 28 + 1e-4)
    assert (model.predict(frame(sorted(strange.iterdir())))["familiarity"] < STRANGE).all()
    unread = model.unwrap_python_model().predict_each([b"no image", next(strange.iterdir()).read_bytes()])
    assert np.isnan(float(unread["familiarity"][0]))
    assert unread["familiarity"][1] < STRANGE
    mlflow.set_tracking_uri(run.uri)
    try:
        folder = Path(mlflow.artifacts.download_artifacts("models:/colours@challenger")) / "artifacts" / "bundle"
    finally:
        mlflow.set_tracking_uri(None)
    assert json.loads((folder / "bundle.json").read_text())["familiarity"] == {"step": pytest.approx(1 / 28)}
    assert "its familiarity is near 0" in (folder / "MODEL_CARD.md").read_text()


@pytest.fixture
def probing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of a head alone, with images held out and a place for features."""
    monkeypatch.chdir(tmp_path)
    found = [*fast(tmp_path / "images"), *pretrained(tmp_path, per_class=30), HELD_OUT]
    return ["fit", *found, "--finetuning=LinearProbe", f"--finetuning.features={tmp_path}/features"]


def test_a_probe_of_the_same_images_takes_its_description_from_the_cache(
    probing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*probing, "--model.head_stages=1"]
    seen: list[int] = []
    real = finishing.describe
    monkeypatch.setattr(
        finishing, "describe", lambda network, images: (seen.append(len(images)), real(network, images))[1]
    )
    assert main(command) == 0
    assert sum(seen) > 60  # in batches that are filled up, and an empty image to ask for the widths
    seen.clear()
    assert main(command) == 0
    assert seen == [1, 1]


def test_what_the_head_was_solved_on_describes_the_training_images(
    probing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    real = backbones.features
    monkeypatch.setattr(
        backbones, "features", lambda network, images: (batches.append(len(images)), real(network, images))[1]
    )
    assert main(probing) == 0
    (folder,) = Path("runs").iterdir()
    of_split = [row.split(",")[2] for row in (folder / "split.csv").read_text().splitlines()]
    assert len(batches) == sum(-(-of_split.count(split) // 32) for split in ("train", "val"))
    with (folder / "predictions.csv").open(newline="") as lines:
        assert all(0 < float(row["familiarity"]) <= 1 for row in csv.DictReader(lines))


# What is refused


@pytest.mark.parametrize(
    ("found", "message"),
    [([0.5, 0.5], None), ([0.5, 0.52], None), ([0.5, 0.6], "by 0.1 in"), ([0.5], "by inf in"), ([], "by inf in")],
)
def test_a_model_that_finds_others_strange_is_not_registered(found: list[float], message: str | None) -> None:
    tested = Predictions(np.zeros(2, np.int64), np.full((2, 2), 0.5), familiarity=np.array([0.5, 0.5]))
    if message is None:
        require_familiarity(np.array(found), tested, 0.02, "it")
        return
    with pytest.raises(RuntimeError, match=f"it disagrees with the test {message} how familiar images are"):
        require_familiarity(np.array(found), tested, 0.02, "it")


def test_a_model_that_knows_of_no_strange_images_agrees_where_none_was_measured() -> None:
    require_familiarity(np.empty(0), Predictions(np.zeros(2, np.int64), np.full((2, 2), 0.5)), None, "it")


# Where nothing is held out


def test_images_that_are_held_out_from_each_other_say_as_much() -> None:
    shares, elsewhere = [], []
    for seed in range(20):
        made = Familiarity.among(drawn(60, (8, 16), 2 * seed), range(60))
        shares.append((made(drawn(400, (8, 16), 2 * seed + 1)) < STRANGE).float().mean().item())
        elsewhere.append(made([-stage for stage in drawn(20, (8, 16), 2 * seed + 1)]).max().item())
    assert 0.03 < np.mean(shares) < 0.065
    assert max(elsewhere) == pytest.approx(1 / 61)


def test_an_image_is_not_as_usual_as_its_copy_is_near() -> None:
    images = [torch.cat([stage, stage]) for stage in drawn(40, (8,), 0)]
    new = drawn(400, (8,), 1)
    alone, together = (Familiarity.among(images, units) for units in (range(80), [*range(40)] * 2))
    assert (alone(new) < STRANGE).float().mean() == 1.0
    assert (together(new) < STRANGE).float().mean() < 0.1


def test_a_head_that_is_solved_on_all_images_tells_strange_ones(
    probing: list[str], strange: Path, tmp_path: Path
) -> None:
    command = [argument for argument in probing if "val_fraction" not in argument]
    assert main([*command, "--trainer.logger=false"]) == 0
    (run,) = Path("runs").iterdir()
    with (run / "predictions.csv").open(newline="") as file:
        tested = familiarity_of(list(csv.DictReader(file)))
    assert np.mean(np.array(tested) < STRANGE) < 0.3
    asked = ["predict", f"--ckpt_path={run / 'best.ckpt'}", f"--data.predict_path={strange}", "--data.num_workers=0"]
    assert main([*asked, f"--output={tmp_path / 'table.csv'}"]) == 0
    with (tmp_path / "table.csv").open(newline="") as file:
        assert max(familiarity_of(list(csv.DictReader(file)))) < STRANGE


def test_images_of_few_groups_cannot_be_held_out_from_each_other(probing: list[str]) -> None:
    command = [argument for argument in probing if "val_fraction" not in argument]
    command += ["--trainer.logger=false", "--data.group_pattern=([a-z]+/[0-9]{2})"]  # by ten
    assert main(command) == 0
    (run,) = Path("runs").iterdir()
    assert "familiarity" not in (run / "predictions.csv").read_text().splitlines()[0]
