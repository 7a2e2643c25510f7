"""The contracts that keep a model honest: label space, preprocessing, frozen parts.

Each holds from the file on disk, or through the command line, to where it matters; the parts have tests of their own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from pipeline.cli import main
from pipeline.finetuning import FullFineTuning, Strategy
from pipeline.models.backbones import depth_groups
from pipeline.task import ClassificationTask
from tests.images import RECORD, folder_module, smooth
from tests.support import fast

# Label space


def write_coloured(folder: Path, colour: tuple[int, int, int], count: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(count)
    for number in range(count):
        pixels = np.clip(np.array(colour) + rng.normal(0, 40, (40, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_a_validation_split_without_a_class_keeps_the_indices_to_the_end(tmp_path, monkeypatch):
    colours = {"a": (220, 40, 40), "b": (40, 220, 40), "c": (40, 40, 220)}
    for split, names in (("train", "abc"), ("val", "ac"), ("test", "ac")):
        for name in names:
            write_coloured(tmp_path / "images" / split / name, colours[name], 16 if split == "train" else 6)
    monkeypatch.chdir(tmp_path)
    rates = ["--model.learning_rate=0.01", "--model.head_learning_rate=0.01", "--trainer.max_epochs=6"]
    network = ["--model.backbone=resnet20", "--trainer.logger=false"]
    assert main(["fit", "--quiet", *fast(tmp_path / "images"), *network, *rates]) == 0
    (predictions,) = tmp_path.glob("runs/*/predictions.csv")
    rows = [line.split(",") for line in predictions.read_text().splitlines()]
    column = rows[0].index("label")
    found = {(Path(row[0]).parent.name, row[column]) for row in rows[1:]}
    assert found == {("a", "a"), ("c", "c")}, "the classes shift where b is missing"
    assert rows[0][-3:] == ["p_a", "p_b", "p_c"]


# Preprocessing


def _grey(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).convert("L"))


def _save_palette(picture: np.ndarray, path: Path) -> None:
    Image.fromarray(picture).quantize(64).save(path)


def _save_turned(picture: np.ndarray, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    Image.fromarray(np.rot90(picture)).save(path, exif=exif)


def _save_alpha(picture: np.ndarray, path: Path) -> None:
    opacity = np.full((*picture.shape[:2], 1), 128, np.uint8)
    Image.fromarray(np.concatenate([picture, opacity], axis=2)).save(path)


def _save_sixteen_bit_colour(picture: np.ndarray, path: Path) -> None:
    assert cv2.imwrite(str(path), picture[:, :, ::-1].astype(np.uint16) * 257)


def _save_sixteen_bit_grey(picture: np.ndarray, path: Path) -> None:
    assert cv2.imwrite(str(path), _grey(picture).astype(np.uint16) * 257)


FORMS: dict[str, tuple[str, Callable[[np.ndarray, Path], Any], Callable[[np.ndarray], np.ndarray]]] = {
    # form: file name, how it is written, what a plain RGB file of the same picture holds
    "grey": ("x.png", lambda p, path: Image.fromarray(_grey(p)).save(path), lambda p: np.stack([_grey(p)] * 3, 2)),
    "palette": (
        "x.png",
        _save_palette,
        lambda p: np.asarray(Image.fromarray(p).quantize(64).convert("RGB")),
    ),
    "CMYK": ("x.tif", lambda p, path: Image.fromarray(p).convert("CMYK").save(path), lambda p: p),
    "16-bit grey": ("x.png", _save_sixteen_bit_grey, lambda p: np.stack([_grey(p)] * 3, 2)),
    "16-bit colour": ("x.png", _save_sixteen_bit_colour, lambda p: p),
    "16-bit colour TIFF": ("x.tif", _save_sixteen_bit_colour, lambda p: p),
    "16-bit grey TIFF": ("x.tif", _save_sixteen_bit_grey, lambda p: np.stack([_grey(p)] * 3, 2)),
    "alpha": ("x.png", _save_alpha, lambda p: p),
    "EXIF-rotated": ("x.png", _save_turned, lambda p: p),
    "EXIF-rotated JPEG": ("x.jpg", _save_turned, lambda p: p),
}


def network_input(folder: Path) -> Tensor:
    """What reaches the network for the files of a folder, after decoding, resizing and normalising."""
    data = folder_module(None, predict_path=str(folder), classes=["a", "b"])
    data.setup("predict")
    task = ClassificationTask(["a", "b"], RECORD, "resnet20").eval()
    seen = []
    task.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        for batch in data.predict_dataloader():
            task.predict_step(batch, 0)
    return torch.cat(seen)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_gives_the_tensor_of_its_plain_rgb_file(tmp_path, form):
    name, write, plain = FORMS[form]
    picture = smooth(52, 70, phase=0.4)
    (tmp_path / "form").mkdir()
    (tmp_path / "plain").mkdir()
    write(picture, tmp_path / "form" / name)
    Image.fromarray(plain(picture)).save(tmp_path / "plain" / "x.png")
    found, expected = network_input(tmp_path / "form"), network_input(tmp_path / "plain")
    assert found.shape == expected.shape == (1, 3, 32, 32)
    assert expected.std() > 0.3, "a flat picture would look alike in any form"
    one_level = 1 / 255 / RECORD["std"][0]
    lossy = 8 if form.endswith("JPEG") else 1
    assert (found - expected).abs().max() <= lossy * one_level + 1e-6


# Frozen parts


class LowerHalf(Strategy):
    """Freezes the first half of the groups of layers."""

    def frozen(self, network: nn.Module) -> list[str]:
        groups = depth_groups(network)
        return [name for group in groups[: len(groups) // 2] for name in group]


class HeadOnly(Strategy):
    """Freezes all but the head."""

    def frozen(self, network: nn.Module) -> list[str]:
        return [name for group in depth_groups(network)[:-1] for name in group]


class Steps(Callback):
    """Counts optimizer steps, and notes the modes of the network's normalisations."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.steps = trainer.global_step


def fifty_steps(task: ClassificationTask, strategy: Strategy | None, root: Path) -> None:
    pl.seed_everything(0, verbose=False)
    steps = Steps()
    data = folder_module(root, classes=None)
    trainer = Trainer(
        max_steps=50,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        callbacks=[steps, *([strategy] if strategy else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=2,
    )
    trainer.fit(task, data)
    assert steps.steps == 50


@pytest.fixture
def three_classes(image_folder) -> Path:
    return image_folder({"a": 12, "b": 12, "c": 12})


@pytest.mark.parametrize("backbone", ["resnet20", "timm/test_efficientnet", "timm/test_vit"])
@pytest.mark.parametrize("strategy", [HeadOnly, LowerHalf])
def test_fifty_steps_leave_frozen_tensors_and_buffers_bit_identical(three_classes, backbone, strategy):
    size = {"size": 160} if backbone == "timm/test_vit" else {}
    task = ClassificationTask(["a", "b", "c"], RECORD | size, backbone)
    made = strategy()
    frozen = set(made.frozen(task.network))
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    # A buffer belongs to the part that its module's parameters belong to.
    parts = {name.rpartition(".")[0] for name in frozen}
    fifty_steps(task, made, three_classes)
    after = task.network.state_dict()
    still = [name for name in after if name in frozen or name.rpartition(".")[0] in parts]
    assert len(still) >= len(frozen) > 0
    assert [name for name in still if not torch.equal(before[name], after[name])] == []
    trained = [name for name, _ in task.network.named_parameters() if name not in frozen]
    assert all(not torch.equal(before[name], after[name]) for name in trained if before[name].numel() > 1)


def test_full_fine_tuning_moves_parameters_and_statistics(three_classes):
    task = ClassificationTask(["a", "b", "c"], RECORD, "resnet20")
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    fifty_steps(task, FullFineTuning(), three_classes)
    same = [name for name, value in task.network.state_dict().items() if torch.equal(before[name], value)]
    assert same == []


class Careless(HeadOnly):
    """Freezes the gradients, and forgets the statistics."""

    def hold(self, network: nn.Module) -> None:
        pass


def test_a_strategy_that_lets_frozen_statistics_move_is_caught_at_the_end(three_classes):
    task = ClassificationTask(["a", "b", "c"], RECORD, "resnet20")
    with pytest.raises(RuntimeError, match=r"Careless froze \d+ tensors, and training has changed some"):
        fifty_steps(task, Careless(), three_classes)


def test_frozen_parts_normalise_by_stored_statistics_while_training(three_classes):
    task = ClassificationTask(["a", "b", "c"], RECORD, "resnet20")
    modes: dict[str, set[bool]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, *_: modes.setdefault(name, set()).add(module.training and torch.is_grad_enabled())

    for name, module in task.network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(note(name))
    fifty_steps(task, LowerHalf(), three_classes)
    frozen = {name.rpartition(".")[0] for name in LowerHalf().frozen(task.network)}
    assert {name for name, seen in modes.items() if True not in seen} == frozen & set(modes)
    assert len(modes) > len(frozen & set(modes)) > 0
