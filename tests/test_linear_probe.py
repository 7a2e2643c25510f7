"""A linear probe is solved, not trained: one pass over the images, a frozen backbone, one checkpoint."""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from pipeline.cli import main
from pipeline.finetuning import probe, solving
from pipeline.models import backbones
from pipeline.task import ClassificationTask
from tests.support import COLOURS, fast, pretrained


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    found = [*fast(tmp_path / "images"), *pretrained(tmp_path, per_class=16)]
    return ["fit", *found, "--finetuning=LinearProbe", f"--finetuning.features={tmp_path}/features"]


def run_folders() -> list[Path]:
    # By time, not by name: two runs of one second are named in any order.
    return sorted(Path("runs").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)


def network_of(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("network.")}


def test_each_image_passes_the_network_once_and_the_backbone_stays(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    real = backbones.features
    monkeypatch.setattr(
        backbones, "features", lambda network, images: (seen.append(len(images)), real(network, images))[1]
    )
    stepped = []
    monkeypatch.setattr(ClassificationTask, "training_step", lambda *_: stepped.append(1))
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "the head is solved on features of the frozen backbone, without epochs" in out
    assert "training   no epochs" in out
    assert "images/s" not in out
    (folder,) = run_folders()
    assert stepped == []
    trained_on = sum(row.split(",")[2] == "train" for row in (folder / "split.csv").read_text().splitlines())
    assert len(seen) == -(-trained_on // 32)  # batches, the last one filled up
    found = network_of(folder)
    loaded = load_file("weights.safetensors")
    moved = [name for name, value in found.items() if not torch.equal(value, loaded[name.removeprefix("network.")])]
    assert moved == ["network.linear.weight", "network.linear.bias"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"]["test/accuracy"]["value"] == 1.0
    content = torch.load(folder / "best.ckpt", weights_only=True)
    assert summary["temperature"] == round(float(content["state_dict"]["temperature"]), 4) != 1.0


def test_it_answers_as_the_same_regression_in_scikit_learn(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {}

    def noted(features: torch.Tensor, targets: torch.Tensor, *others: Any, **settings: Any) -> probe.Probe:
        kept["x"], kept["y"] = features.numpy(), targets.numpy()
        kept["probe"] = probe.fit_probe(features, targets, *others, **settings)
        return kept["probe"]

    monkeypatch.setattr(solving, "fit_probe", noted)
    assert main([*arguments, "--trainer.logger=false"]) == 0
    mean, variance = kept["x"].mean(0), kept["x"].var(0)
    told = variance > 1e-12 * variance.max()
    count = len(kept["x"])
    stages = np.repeat([0, 1, 2], [16, 32, 64])
    typical = np.array([np.quantile(variance[told & (stages == stage)], 0.5, method="lower") for stage in stages])
    deviation = np.sqrt((count * variance + 4 * typical) / (count + 4))
    scaled = (kept["x"][:, told] - mean[told]) / deviation[told]
    strength = 1 / (kept["probe"].penalty * len(scaled))
    reference = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(scaled, kept["y"])
    found = network_of(run_folders()[0])
    weight, bias = found["network.linear.weight"].numpy(), found["network.linear.bias"].numpy()
    logits = kept["x"] @ weight.T + bias
    ours = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(ours / ours.sum(1, keepdims=True), reference.predict_proba(scaled), atol=2e-3)
    assert sorted(COLOURS) == json.loads((run_folders()[0] / "summary.json").read_text())["classes"]


def test_the_head_sees_three_stages_unless_another_number_is_set(arguments: list[str]) -> None:
    arguments = [*arguments, "--trainer.logger=false"]
    assert main(arguments) == 0
    # With the features of the first run at hand, of which it must take none.
    assert main([*arguments, "--model.head_stages=1"]) == 0
    heads = [network_of(folder)["network.linear.weight"] for folder in run_folders()]
    assert [head.shape[1] for head in heads] == [16 + 32 + 64, 64]
    for folder in run_folders():
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["metrics"]["test/accuracy"]["value"] == 1.0


def test_the_head_of_a_timm_network_sees_three_stages_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is what few images are left to; it is handed over, and answers alone as it was tested."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network = pretrained(tmp_path, per_class=12, backbone="timm/test_efficientnet")
    assert main(["fit", *fast(tmp_path / "images"), *network, "--trainer.logger=false"]) == 0
    (folder,) = run_folders()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert lines["finetuning"].split()[1] == "LinearProbe"
    assert lines["model.head_stages"].split()[1] == "3"
    assert network_of(folder)["network.classifier.weight"].shape[1] == 32 + 48 + 256
    assert json.loads((folder / "summary.json").read_text())["metrics"]["test/accuracy"]["value"] == 1.0
    with (folder / "predictions.csv").open(newline="") as lines:
        tested = {row["path"]: row for row in csv.DictReader(lines)}
    where = [f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder / 'best.ckpt'}"]
    assert main(["predict", *where, f"--data.predict_path={tmp_path / 'images'}", "--output=answers.csv"]) == 0
    with Path("answers.csv").open(newline="") as lines:
        answers = {row["path"]: row for row in csv.DictReader(lines)}
    assert len(answers) > len(tested) > 0
    for path, row in tested.items():
        assert answers[path]["label"] == row["label"]
        for column in ("score", "familiarity"):
            assert float(answers[path][column]) == pytest.approx(float(row[column]), abs=1e-3)


def test_it_is_solved_on_turned_images_too_and_holds_an_image_out_in_all_its_views(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []

    def noted(features: torch.Tensor, targets: torch.Tensor, *others: Any, **settings: Any) -> probe.Probe:
        kept.append((features.numpy(), targets.numpy(), others[-1]))
        return probe.fit_probe(features, targets, *others, **settings)

    monkeypatch.setattr(solving, "fit_probe", noted)
    arguments = [*arguments, "--trainer.logger=false", "--data.orientation=flipped"]
    assert main(arguments) == 0
    assert main([*arguments, "--finetuning.turned=true"]) == 0
    (plain, classes, _), (features, targets, together) = kept
    views = features.reshape(4, *plain.shape)
    np.testing.assert_array_equal(views[0], plain)
    assert all(np.abs(one - other).max() > 1e-4 for one, other in itertools.combinations(views, 2))
    np.testing.assert_array_equal(targets.reshape(4, -1), np.tile(classes, (4, 1)))
    by_view = np.array(together, dtype=object).reshape(4, -1)
    assert (by_view == by_view[0]).all()
    assert len(set(by_view[0])) == len(plain)


def test_an_interruption_while_features_are_computed_stops_at_once_and_what_is_done_is_kept(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = solving.fit_probe

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(solving, "fit_probe", stopped)
    assert main([*arguments, "--trainer.logger=false"]) == 130
    assert not (run_folders()[0] / "best.ckpt").exists()
    monkeypatch.setattr(solving, "fit_probe", real)

    def looks(*_: Any) -> None:
        raise AssertionError("features were computed again")

    monkeypatch.setattr(backbones, "features", looks)
    assert main([*arguments, "--trainer.logger=false"]) == 0
    assert (run_folders()[-1] / "best.ckpt").is_file()


def test_the_checkpoint_answers_the_same_when_tested_again(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--trainer.logger=false"]) == 0
    (folder,) = run_folders()
    summary = json.loads((folder / "summary.json").read_text())
    capsys.readouterr()
    assert main(["test", f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder / 'best.ckpt'}"]) == 0
    assert f"log loss  {summary['metrics']['test/log_loss']['value']:.4f}" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_an_error_that_says_what_to_do(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    assert main([argument for argument in arguments if "features" not in argument]) == 2
    error = capsys.readouterr().err
    assert f"features: expected to keep what belongs to them in '{tmp_path}/no folder" in error
    assert "choose another folder (finetuning.features, or XDG_CACHE_HOME)" in error


def test_what_a_solved_head_does_not_see_is_not_told_of_it(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--imbalance=logit_adjustment", "--model.test_time_augmentation=flip", "--model.mixing=mixup"]
    assert main([*arguments, *told]) == 0
    out = capsys.readouterr().out
    assert "imbalance  logit_adjustment: the classes' shares are taken out" in out
    assert "views      flip" in out
    assert "mixing" not in out
