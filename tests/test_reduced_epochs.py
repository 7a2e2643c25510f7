"""Training that begins with smaller images: how large they are in which epoch, and that they show the same."""

from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import torch

from datamodules import DataError
from datamodules.transforms import reduced_size
from pipeline import task
from pipeline.cli import main
from tests.images import epoch_of, folder_module, save
from tests.support import MACHINE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, phase in (("cat", 0.0), ("dog", 1.5)):
        for number in range(10):
            save(tmp_path / "images" / name / f"{number}.png", phase + number / 20, (120, 140))
    return tmp_path / "images"


def test_the_first_epochs_have_smaller_images_and_those_that_follow_do_not(root: Path) -> None:
    module = folder_module(root, image_size=128, train_size=96, reduced_epochs=2, num_workers=2)
    sizes = [{tuple(batch["image"].shape[1:]) for batch in epoch_of(module, epoch)} for epoch in range(4)]
    assert sizes == [{(3, 64, 64)}] * 2 + [{(3, 96, 96)}] * 2
    assert {tuple(batch["image"].shape[1:]) for batch in module.test_dataloader()} == {(3, 128, 128)}


@pytest.mark.parametrize(
    "transforms",
    [
        "light",
        [A.RandomResizedCrop(size=(96, 96)), A.CenterCrop(96, 96)],
        [A.RandomResizedCrop(size=(64, 64))],  # is fitted to 96 px, and then shrunk, though it has 64 px already
    ],
)
def test_a_smaller_image_shows_what_the_large_one_would(root: Path, transforms: object) -> None:
    shared = {"image_size": 96, "train_transforms": transforms}
    usual, reduced = (folder_module(root, **shared, reduced_epochs=epochs).dataset("train") for epochs in (0, 3))
    for index in range(6):
        large, small = (each[(1, index, 0)]["image"].permute(1, 2, 0).numpy() for each in (usual, reduced))
        shrunk = cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(shrunk.astype(float) - small).mean() < 2  # of 255; another crop differs by some 30
        assert torch.equal(usual[(3, index, 0)]["image"], reduced[(3, index, 0)]["image"])


def test_no_image_is_smaller_than_networks_take() -> None:
    sizes = (32, 40, 64, 96, 128, 160, 192, 224, 384)
    assert [reduced_size(size) for size in sizes] == [32, 32, 64, 64, 96, 128, 160, 192, 320]


def test_less_than_no_epoch_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"data\.reduced_epochs: expected 0 or more, found -1"):
        folder_module(root, reduced_epochs=-1)


def test_a_run_trains_on_smaller_images_first(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[bool, int]] = []

    def note(network: torch.nn.Module, images: tuple[torch.Tensor]) -> None:
        if not seen or seen[-1] != (network.training, images[0].shape[-1]):
            seen.append((network.training, images[0].shape[-1]))

    def watched(*arguments: object, **settings: object) -> torch.nn.Module:
        network = create(*arguments, **settings)
        network.register_forward_pre_hook(note)
        return network

    create = task.create_backbone
    monkeypatch.setattr(task, "create_backbone", watched)
    size = ["--data.image_size=96", "--data.reduced_epochs=1", "--data.batch_size=4", "--trainer.max_epochs=2"]
    told = ["--model.backbone=resnet20", "--finetuning=FullFineTuning", "--trainer.num_sanity_val_steps=0"]
    assert main(["fit", f"--data.root={root}", "--quiet", *size, *told, *MACHINE]) == 0
    trained = [side for training, side in seen if training]
    assert trained == [64, 96]
    assert {side for training, side in seen if not training} == {96}
