"""Temperature scaling: what it does to probabilities, what it is fitted to, and where it is kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torchmetrics.classification import MulticlassCalibrationError

from pipeline.checkpoints import CALIBRATED, TEMPERATURE, calibrate_checkpoint, read_checkpoint
from pipeline.cli import main
from pipeline.evaluation.calibration import fit_temperature, temper, tempered
from pipeline.evaluation.predictions import Predictions
from pipeline.task import ClassificationTask
from tests.support import fast, pretrained, write_images


def drawn(temperature: float, count: int = 4000, classes: int = 5, seed: int = 0) -> Predictions:
    """Answers that are too sure (or unsure) by a known temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return Predictions(targets.numpy(), (logits * temperature).softmax(1).numpy())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_answers_too_sure_is_found(temperature: float) -> None:
    assert fit_temperature(drawn(temperature)) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_of_several_classes_it_is_that_of_a_logistic_regression(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3000, 4, generator=generator, dtype=torch.float64)
    targets = torch.bernoulli(logits.sigmoid(), generator=generator).long()
    predictions = Predictions(targets.numpy(), (logits * temperature).sigmoid().numpy(), multi_label=True)
    slope = LogisticRegression(C=1e9, fit_intercept=False).fit(
        (logits * temperature).reshape(-1, 1).numpy(), targets.flatten().numpy()
    )
    assert fit_temperature(predictions) == pytest.approx(1 / slope.coef_[0, 0], rel=0.01)


def test_tempered_answers_are_calibrated_and_keep_their_labels() -> None:
    fitted, unseen = drawn(3.0), drawn(3.0, seed=1)
    error = MulticlassCalibrationError(num_classes=5, n_bins=15)
    after = tempered(unseen, fit_temperature(fitted))

    def error_of(predictions: Predictions) -> float:
        return float(error(torch.from_numpy(predictions.probabilities), torch.from_numpy(predictions.targets)))

    assert error_of(after) < 0.03 < 0.15 < error_of(unseen)
    assert np.array_equal(after.labels, unseen.labels)
    assert after.losses.mean() < unseen.losses.mean() - 0.3


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_divides_logits(temperature: float, multi_label: bool) -> None:
    logits = 4 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    link = torch.sigmoid if multi_label else lambda x: x.softmax(1)
    found = temper(link(logits), temperature, multi_label)
    torch.testing.assert_close(found, link(logits / temperature), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
def test_certainty_stays_finite(multi_label: bool) -> None:
    probabilities = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    for temperature in (0.1, 1.0, 10.0):
        found = temper(probabilities, temperature, multi_label)
        assert torch.isfinite(found).all()
        assert found.argmax(1).tolist() == [0, 2]


def test_a_few_right_answers_do_not_ask_for_certainty() -> None:
    few = Predictions(np.zeros(6, np.int64), np.tile([0.7, 0.3], (6, 1)))
    many = Predictions(np.zeros(600, np.int64), np.tile([0.7, 0.3], (600, 1)))
    assert fit_temperature(few) > 0.8
    assert fit_temperature(many) < 0.3
    assert fit_temperature(many, width=np.inf) == pytest.approx(0.1, rel=0.01)


def test_lucky_images_say_little_against_what_is_usual() -> None:
    """75 images, of which 70 are right by luck, where 66 would be: they ask for more certainty than others bear out."""
    probabilities = np.tile([0.88, 0.12], (75, 1))
    lucky = Predictions((np.arange(75) >= 70).astype(np.int64), probabilities)
    alone, weighed = fit_temperature(lucky, width=np.inf), fit_temperature(lucky)
    assert alone + 0.05 < weighed < 1


@pytest.mark.parametrize("classes", [1, 10])
def test_each_class_of_an_image_says_as_much(classes: int) -> None:
    """Ten independent answers of an image say as much of the temperature as one answer of ten images."""
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    targets = torch.bernoulli(logits.sigmoid(), generator=generator).long()
    shape = (400 // classes, classes)
    made = Predictions(targets.view(shape).numpy(), (2 * logits).sigmoid().view(shape).numpy(), multi_label=True)
    alone = Predictions(targets.numpy(), (2 * logits).sigmoid().numpy(), multi_label=True)
    assert fit_temperature(made) == pytest.approx(fit_temperature(alone), rel=1e-3)
    assert fit_temperature(made) > 1.4


# In a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("run")
    write_images(home / "images", per_class=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        arguments = [*fast(home / "images"), "--trainer.max_epochs=2"]
        assert main(["fit", *arguments]) == 0
    (folder,) = (home / "runs").iterdir()
    return folder


def test_the_best_checkpoint_keeps_it(run: Path) -> None:
    content = read_checkpoint(run / "best.ckpt")
    temperature = float(content["state_dict"][TEMPERATURE])
    assert content[CALIBRATED]
    assert temperature != 1
    assert float(read_checkpoint(run / "last.ckpt")["state_dict"][TEMPERATURE]) == 1
    task = ClassificationTask.load_from_checkpoint(run / "best.ckpt", map_location="cpu", weights_only=True).eval()
    assert float(task.temperature) == temperature
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        expected = (task(images) / temperature).softmax(1)
        torch.testing.assert_close(task.answer(images).probabilities, expected, atol=1e-6, rtol=1e-4)


def test_what_is_reported_of_validation_is_what_the_checkpoint_answers(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    assert main(["validate", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'best.ckpt'}"]) == 0
    reported = json.loads((run / "summary.json").read_text())["metrics"]
    shown = capsys.readouterr().out
    for name, words in (("log_loss", "log loss"), ("accuracy", "accuracy")):
        assert f"{words:<9} {reported[f'val/{name}']['value']:.4f}" in shown
    assert reported["val/log_loss"]["value"] > 0


def test_a_checkpoint_of_an_earlier_release_is_not_calibrated(run: Path, tmp_path: Path) -> None:
    content = read_checkpoint(run / "best.ckpt")
    del content["state_dict"][TEMPERATURE], content[CALIBRATED]
    content["hyper_parameters"]["label_smoothing"] = 0.1  # a setting that was
    torch.save(content, tmp_path / "old.ckpt")
    task = ClassificationTask.load_from_checkpoint(tmp_path / "old.ckpt", map_location="cpu", weights_only=True)
    assert float(task.temperature) == 1
    assert main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={tmp_path / 'old.ckpt'}"]) == 0


def test_what_goes_on_from_a_calibrated_checkpoint_is_calibrated_anew(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    temperatures = []
    for earlier in (0.25, 4.0):
        checkpoint = tmp_path / f"{earlier}.ckpt"
        checkpoint.write_bytes((run / "best.ckpt").read_bytes())
        calibrate_checkpoint(checkpoint, earlier)
        arguments = [*fast(run.parent.parent / "images"), "--trainer.max_epochs=4", "--trainer.logger=false"]
        assert main(["fit", *arguments, f"--ckpt_path={checkpoint}"]) == 0
        folder = max(Path("runs").iterdir())
        assert float(read_checkpoint(folder / "last.ckpt")["state_dict"][TEMPERATURE]) == 1
        temperatures.append(float(read_checkpoint(folder / "best.ckpt")["state_dict"][TEMPERATURE]))
    assert temperatures[0] == temperatures[1] != 1


def test_a_checkpoint_is_the_old_one_until_the_new_one_is_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_bytes((run / "best.ckpt").read_bytes())
    before = checkpoint.read_bytes()

    def fails(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails)
        with pytest.raises(OSError, match="disk full"):
            calibrate_checkpoint(checkpoint, 2.0)
    assert checkpoint.read_bytes() == before
    calibrate_checkpoint(checkpoint, 2.0)
    assert float(read_checkpoint(checkpoint)["state_dict"][TEMPERATURE]) == 2


def test_a_checkpoint_that_is_calibrated_is_not_calibrated_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after an interruption between the calibration and the end."""
    monkeypatch.chdir(run.parent.parent)
    before = (run / "best.ckpt").read_bytes()
    reported = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    arguments = [*fast(run.parent.parent / "images"), "--trainer.max_epochs=2"]
    capsys.readouterr()
    assert main(["fit", *arguments, "--ckpt_path=last"]) == 0
    assert (run / "best.ckpt").read_bytes() == before
    again = json.loads((run / "summary.json").read_text())
    assert again["temperature"] == reported["temperature"]
    assert again["metrics"]["val/log_loss"]["value"] == pytest.approx(reported["metrics"]["val/log_loss"]["value"])


@pytest.mark.parametrize("strategy", ["FullFineTuning", "ProbeThenFineTune"])
def test_a_training_that_went_astray_hands_nothing_over(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*fast(tmp_path / "images"), *pretrained(tmp_path, per_class=8), "--trainer.logger=false"]
    arguments += [f"--finetuning={strategy}", "--trainer.max_epochs=1", "--model.learning_rate=1e30"]
    assert main(["fit", *arguments, "--data.val_fraction=0"]) == 2
    assert "training: expected finite weights at its end, found others ('network." in capsys.readouterr().err
    (folder,) = Path("runs").iterdir()
    assert not (folder / "summary.json").exists()
