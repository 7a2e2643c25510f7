"""What a person's mistakes get: one clear line, exit code 2, no traceback, no half-made run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import save_file

from pipeline.cli import main
from pipeline.models.family import FAMILY
from tests.support import fast, write_images

STRATEGIES = "FullFineTuning, GradualUnfreezing, KernelProbe, LinearProbe, ProbeThenFineTune"


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=6)
    return tmp_path / "images"


@pytest.fixture
def complaint(images: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that must be refused; the line it gives."""

    def run(*arguments: str, subcommand: str = "fit", defaults: bool = True) -> str:
        given = [subcommand, *(fast(images) if defaults else []), "--trainer.max_epochs=1", *arguments]
        assert main(given) == 2
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        lines = shown.strip().splitlines()
        assert len(lines) == 1, shown
        assert lines[0].startswith("error: ")
        assert not Path("runs").exists()
        assert not running_runs()
        return lines[0]

    return run


def running_runs() -> list[str]:
    if not Path("mlflow.db").exists():
        return []
    uri = f"sqlite:///{Path('mlflow.db').resolve()}"
    client = MlflowClient(uri, uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.run_id for run in client.search_runs(experiments) if run.info.status == "RUNNING"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("--model.backbone=resnet81", "did you mean resnet18"),
        ("--model.backbone=timm/resnet81", "set model.backbone to timm/<a known model>"),
        ("--model.bakbone=resnet18", "model.bakbone: expected a known setting, found none of this name; did you mean"),
        ("--model.num_classes=3", "the number of classes is that of the training data"),
        ("--model.classes=[red,green]", "model.classes: expected no value"),
        ("--data.seed=3", "data.seed: expected no value"),
        ("--data.imbalance=none", "it follows the setting imbalance, beside data and model"),
        ("--model.imbalance=weighted_loss", "model.imbalance: expected no value, found one"),
        ("--model.seed=3", "remove it: it follows seed_everything"),
        ("--model.multi_label=true", "model.multi_label: expected no value, found one"),
        ("--data.multi_label=true", "data.multi_label: expected no value, found one"),
        ("--model.class_shares=[0.5,0.5]", "remove it: it follows from the training data"),
        ("--imbalance=balanced", "weighted_loss, logit_adjustment, found balanced; did you mean balanced_sampling?"),
        ("--imbalnce=none", "did you mean imbalance? see --help"),
        ("--model.mixing=mixupp", "expected none, mixup, cutmix, either, found mixupp; did you mean mixup?"),
        ("--model.mixing_alpha=0", "model.mixing_alpha: expected a finite strength above 0"),
        ("--model.test_time_augmentation=flp", "found flp; did you mean flip or flips?"),
        ("--data.image_size=large", "data.image_size: expected int or auto, found large"),
        ("--data.batch_size=many", "data.batch_size: expected int or auto, found many"),
        ("--data.batch_size=1", "data.batch_size: expected at least 2"),
        ("--data.image_size=8", "data.image_size: expected at least 32"),
        ("--data.val_fraction=2", "expected a share from 0 to below 1"),
        ("--data.num_workers=-1", "data.num_workers: expected 0 or more"),
        ("--data.train_transforms=wild", "expected light, standard, strong, trivial_augment or a list"),
        ("--data.rot=somewhere", "did you mean data.root"),
        ("--data=ElpvDataModul", "did you mean ElpvDataModule? set data"),
        ("--finetuning=LinearProb", f"expected {STRATEGIES} or the import path"),
        ("--finetuning=Strategy", f"expected {STRATEGIES} or the import path"),
        ("--finetuning.freeze_early=0.07", f"expected {STRATEGIES} or the import path"),
        ("--finetuning={class_path: GradualUnfreezing, init_args: {share: 0}}", "finetuning.share: expected a share"),
        ("--model.layer_decay=0", "model.layer_decay: expected a factor in (0, 1], found 0"),
        ("--budget=soon", "--budget: expected a time such as 90s, 5m or 1h30m, found 'soon'"),
        ("--budget=0s", "--budget: expected a time such as"),
        ("--finetuning=LinearProbe", "expected pretrained weights for LinearProbe to build on"),
        ("--model.dropout=1", "model.dropout: expected a share in [0, 1)"),
        ("--model.dropout=-0.1", "model.dropout: expected a share in [0, 1)"),
        ("--model.warmup_fraction=1", "model.warmup_fraction: expected a share in [0, 1)"),
        ("--model.weights=models:/colours@champion", "expected a store that runs were tracked in, found none"),
        ("--model.weights=torchvision/ResNet18_Weights.IMAGENET1K_V3", "did you mean ResNet18_Weights.IMAGENET1K_V1"),
        ("--model.weights=hf-hub:resnet18", "expected hf-hub:<owner>/<repository>"),
        ("--data=datamodules.ElpvDataModul", "no attribute 'ElpvDataModul'"),
        ("--model.learning_rate=fast", "model.learning_rate: expected float"),
        ("--model.learning_rate=-1", "model.learning_rate: expected a rate above 0"),
        ("--model.learning_rate=0", "model.learning_rate: expected a rate above 0"),
        ("--model.head_learning_rate=0", "model.head_learning_rate: expected a rate above 0"),
        ("--model.weight_decay=-1", "model.weight_decay: expected 0 or more"),
        ("--model.weights=nothing.safetensors", "expected a file, found nothing at 'nothing.safetensors'"),
        ("--model.weights=timm/resnet18.a9_in1k", "its tags are resnet18.a1_in1k"),
        ("--monitor=val/acuracy", "found 'val/acuracy'; did you mean val/accuracy"),
        ("--monitor=val/mean_average_precision", "expected auto, val/accuracy, val/macro_f1, val/loss, found"),
        ("--patience=0", "patience: expected at least 1"),
        ("--trainer.max_epoch=3", "did you mean trainer.max_epochs"),
        ("--trainer.max_epochs=0", "trainer.max_epochs: expected at least 1"),
        ("--trainer.fast_dev_run=true", "trainer.fast_dev_run: expected no value"),
        ("--trainer.limit_test_batches=2", "results are of whole splits"),
        ("--trainer.strategy=fast", "invalid strategy name"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches: expected at least 1"),
        ("--trainer.precision=bf16-true", "trainer.precision: expected 32-true, bf16-mixed or 16-mixed"),
        ("--trainer.precision=64", "found 64; set one of these"),
        ("--seed_everything=-1", "seed_everything: "),
        ("--registered_model_name=a/b", "registered_model_name: expected a name without"),
        ("--logger.tracking_uri=foo://bar", "logger.tracking_uri: expected an MLflow store"),
        ("--ckpt_path=nowhere.ckpt", "expected a file, found nothing at 'nowhere.ckpt'"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(complaint: Callable[..., str], setting: str, expected: str) -> None:
    assert expected in complaint(setting)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: {bakbone: resnet18}", "did you mean model.backbone"),
        ("model: {num_classes: 3}", "the number of classes is that of the training data"),
        ("model: {classes: [blue, green, red]}", "wrong.yaml; remove it: the classes come from the training data"),
        ("data: {init_args: {preprocessing: {size: 3}}}", "the preprocessing comes from the backbone"),
        ("data: {init_args: {imbalance: weighted_loss}}", "wrong.yaml; remove it: it follows the setting imbalance"),
        ("model: {imbalance: weighted_loss}", "model.imbalance: expected no value, found one in wrong.yaml"),
        ("model: {class_shares: [0.3, 0.7]}", "model.class_shares: expected no value, found one in wrong.yaml"),
        ("model: {multi_label: true}", "model.multi_label: expected no value, found one in wrong.yaml"),
        ("model: {seed: 3}", "model.seed: expected no value, found one in wrong.yaml"),
        ("imbalance: weighted", "did you mean weighted_loss?"),
        ("data: {init_args: {batchsize: 3}}", "did you mean data.batch_size"),
        ("data: {init_args: {train_transforms: [{class_path: albumentations.HorizontalFlop}]}}", "HorizontalFlop"),
        ("data: {init_args: {train_transforms: [{class_path: albumentations.Normalize}]}}", "found Normalize"),
        ("seed_everything: true", "seed_everything: "),
    ],
)  # fmt: skip
def test_a_wrong_configuration_file_is_explained(complaint: Callable[..., str], content: str, expected: str) -> None:
    Path("wrong.yaml").write_text(content)
    assert expected in complaint("--config=wrong.yaml")


def test_a_missing_folder(complaint: Callable[..., str]) -> None:
    assert "expected a folder of class folders, found nothing at 'nowhere'" in complaint("--data.root=nowhere")


def test_no_folder_at_all(complaint: Callable[..., str]) -> None:
    assert "give --data.root <folder>" in complaint(defaults=False)


def test_an_empty_class(complaint: Callable[..., str], images: Path) -> None:
    (images / "yellow").mkdir()
    assert "expected images of class 'yellow', found none" in complaint()


def test_a_class_with_too_few_images(complaint: Callable[..., str], images: Path) -> None:
    for path in sorted((images / "red").iterdir())[2:]:
        path.unlink()
    assert "at least 3 images of class 'red'" in complaint()


def test_split_folders_without_training_images(complaint: Callable[..., str], tmp_path: Path) -> None:
    write_images(tmp_path / "divided" / "Test", per_class=3)
    assert "expected a folder 'train' beside 'Test'" in complaint(f"--data.root={tmp_path / 'divided'}")


def test_unreadable_images_are_named_all_at_once(complaint: Callable[..., str], images: Path) -> None:
    (images / "red" / "000.png").write_bytes(b"")
    (images / "green" / "001.png").write_bytes(b"<html>not found</html>")
    whole = (images / "blue" / "002.png").read_bytes()
    (images / "blue" / "002.png").write_bytes(whole[: len(whole) // 2])
    line = complaint()
    for name in ("red/000.png (it is empty)", "green/001.png (it is a web page)", "blue/002.png ("):
        assert name in line


def test_weights_of_another_architecture(complaint: Callable[..., str], tmp_path: Path) -> None:
    save_file(FAMILY["resnet34"](num_classes=2).state_dict(), tmp_path / "other.safetensors")
    line = complaint("--model.backbone=resnet18", "--model.weights=other.safetensors")
    assert "unexpected: layer1.2." in line
    assert "Set model.backbone to the architecture" in line


def test_weights_that_would_run_code(complaint: Callable[..., str], tmp_path: Path) -> None:
    torch.save({"state_dict": Path("/")}, tmp_path / "unsafe.pth")
    assert "expected a file of tensors" in complaint("--model.weights=unsafe.pth")


def test_a_transform_that_does_not_fit_the_images(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(
        "data: {init_args: {train_transforms: [{class_path: albumentations.RandomCrop,"
        " init_args: {height: 400, width: 400}}]}}"
    )
    assert main(["fit", *fast(images), "--config=c.yaml", "--data.num_workers=1"]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: data.train_transforms: expected transforms that fit the images, found CropSizeError")
    assert "\n" not in line
    assert not running_runs()


def test_a_size_that_the_network_does_not_take(complaint: Callable[..., str]) -> None:
    assert "expected a size that timm/vit_tiny_patch16_224 takes" in complaint(
        "--model.backbone=timm/vit_tiny_patch16_224"
    )


def test_an_image_that_breaks_during_training_ends_the_run_as_failed(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamodules.base.unreadable_images", lambda dataset, progress: {})
    (images / "red" / "000.png").write_bytes(b"broken")
    (images / "red" / "001.png").write_bytes(b"broken")
    (images / "red" / "002.png").write_bytes(b"broken")
    assert main(["fit", *fast(images), "--data.num_workers=1"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "expected an image that can be read" in line
    assert not running_runs()


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_evaluating_without_a_checkpoint(complaint: Callable[..., str], subcommand: str) -> None:
    assert "expected the checkpoint of a trained model, found none" in complaint(subcommand=subcommand)


def test_evaluating_another_kind_of_file(complaint: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"no checkpoint")
    assert "expected a checkpoint written by" in complaint("--ckpt_path=x.ckpt", subcommand="test")


def test_an_unknown_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti"]) == 2
    assert "did you mean fit?" in capsys.readouterr().err


def test_a_traceback_only_when_asked_for(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *fast(images), "--model.backbone=resnet81", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_file_that_is_no_image_is_not_taken_for_one(images: Path) -> None:
    (images / "red" / "notes.txt").write_text("hello")
    Image.new("RGB", (40, 40)).save(images / ".thumbnail.png")
    assert main(["fit", *fast(images), "--trainer.max_epochs=1", "--trainer.logger=false"]) == 0


def test_a_file_where_runs_should_be(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").write_text("")
    assert main(["fit", *fast(images), "--trainer.max_epochs=1"]) == 2
    assert "found that it cannot be written" in capsys.readouterr().err
    assert not Path("mlflow.db").exists()


def test_a_store_in_a_folder_that_is_not_there(complaint: Callable[..., str]) -> None:
    assert "cannot be written" in complaint("--logger.tracking_uri=sqlite:////nowhere/at/all.db")


def test_what_print_config_writes_can_be_used(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *fast(images), "--trainer.max_epochs=1", "--trainer.logger=false", "--print_config"])
    assert stopped.value.code == 0
    Path("whole.yaml").write_text(capsys.readouterr().out)
    assert main(["fit", "--config=whole.yaml"]) == 0
