"""Batches: what is in them, files that cannot be read, and going on in the middle of an epoch."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from datamodules import DataError, checking
from datamodules.dataset import UNLABELLED, EpochSampler, ResumableDataLoader
from datamodules.decode import decode
from tests.images import attach, epoch_of, folder_module, numbered, save

# Batches


def test_batches_are_as_documented(image_folder):
    root = image_folder({"cat": 10, "dog": 10})
    module = folder_module(root, batch_size=3)
    for split, loader in (
        ("train", module.train_dataloader()),
        ("val", module.val_dataloader()),
        ("test", module.test_dataloader()),
    ):
        seen: list[int] = []
        for batch in loader:
            assert sorted(batch) == ["image", "index", "target"]
            assert batch["image"].dtype == torch.uint8
            assert batch["image"].shape == (len(batch["index"]), 3, 32, 32)
            assert batch["target"].dtype == batch["index"].dtype == torch.int64
            paths = module.images(split).paths
            for index, target in zip(batch["index"].tolist(), batch["target"].tolist(), strict=True):
                assert module.classes[target] == paths[index].split("/")[0]
            seen += batch["index"].tolist()
        images = len(module.images(split).paths)
        assert len(seen) == len(set(seen)) == (images // 3 * 3 if split == "train" else images)
        assert (seen == sorted(seen)) == (split != "train")


def test_evaluation_images_are_prepared_by_the_one_geometry(image_folder):
    module = folder_module(image_folder({"cat": 10, "dog": 10}), train_transforms="strong")
    for split, loader in (("val", module.val_dataloader()), ("test", module.test_dataloader())):
        for batch in loader:
            for image, index in zip(batch["image"], batch["index"].tolist(), strict=True):
                pixels = decode(module.images(split).encoded(index))
                expected = module.preprocessing.fit_to_size(pixels)
                assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_an_image_that_already_has_the_networks_size_is_cropped_like_any_other(tmp_path):
    # The served model runs `fit_to_size` on every image: skipping it here would evaluate another model.
    for label in ("cat", "dog"):
        for i in range(4):
            save(tmp_path / label / f"{i}.png", phase=i, size=(32, 32))
    module = folder_module(tmp_path)
    batch = next(iter(module.test_dataloader()))
    pixels = decode(module.images("test").encoded(0))
    expected = module.preprocessing.fit_to_size(pixels)
    assert not np.array_equal(expected, pixels)
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), expected)


def test_a_training_set_smaller_than_a_batch_is_not_lost(image_folder):
    root = image_folder({"train/cat": 2, "train/dog": 1, "val/cat": 1, "test/cat": 1})
    loader = folder_module(root, batch_size=8).train_dataloader()
    assert len(loader) == 1
    assert [len(batch["index"]) for batch in loader] == [3]


def test_user_transforms_that_keep_the_size_are_fitted_to_the_network(image_folder):
    root = image_folder({"cat": 6, "dog": 6})
    module = folder_module(root, train_transforms=[A.HorizontalFlip(p=1.0)])
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    pixels = decode(module.images("train").encoded(int(batch["index"][0])))
    flipped = module.preprocessing.fit_to_size(np.ascontiguousarray(pixels[:, ::-1]))
    assert np.abs(batch["image"][0].permute(1, 2, 0).numpy().astype(int) - flipped).max() <= 1


def test_unlabelled_images_are_predicted_without_any_training_data(image_folder):
    folder = image_folder({"": 3, "deeper": 2}, name="unlabelled")
    module = folder_module(None, classes=["cat", "dog"], predict_path=str(folder))
    assert module.images("predict").paths == ["000.png", "001.png", "002.png", "deeper/000.png", "deeper/001.png"]
    batches = list(module.predict_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([batch["target"] for batch in batches]).tolist() == [UNLABELLED] * 5
    expected = module.preprocessing.fit_to_size(decode(folder / "deeper" / "001.png"))
    assert np.array_equal(batches[-1]["image"][-1].permute(1, 2, 0).numpy(), expected)


def test_predict_falls_back_to_the_test_split(image_folder):
    module = folder_module(image_folder({"cat": 6, "dog": 6}))
    assert module.images("predict").paths == module.images("test").paths
    (predicted,), (tested,) = module.predict_dataloader(), module.test_dataloader()
    assert torch.equal(predicted["image"], tested["image"])


def test_a_predict_path_without_images_is_named(tmp_path):
    for path, text in ((tmp_path, "found none"), (tmp_path / "absent", "found nothing")):
        module = folder_module(None, classes=["cat", "dog"], predict_path=str(path))
        with pytest.raises(DataError, match=rf"data\.predict_path: .*{text}"):
            module.predict_dataloader()


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(128, 1, 8), (128, 8, 8), (16, 4, 4), (8, 2, 4), (6, 4, 1), (2, 8, 1), (2, 1, 2)],
)
def test_each_process_has_a_reader_for_each_core_of_its_share(image_folder, monkeypatch, cores, processes, workers):
    monkeypatch.setattr(checking.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    module = folder_module(image_folder({"cat": 24, "dog": 24}), num_workers="auto")
    assert attach(module, TrainerFn.FITTING, world_size=processes).train_dataloader().num_workers == workers


def test_processes_of_other_machines_take_no_cores_of_this_one(image_folder, monkeypatch):
    monkeypatch.setattr(checking.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    module = attach(folder_module(image_folder({"cat": 24, "dog": 24}), num_workers="auto"), TrainerFn.FITTING, 8)
    module.trainer.num_devices = 2
    assert module.train_dataloader().num_workers == 4


# Unreadable files


def test_unreadable_files_of_one_split_are_all_listed(image_folder):
    root = image_folder({"train/cat": 14, "train/dog": 2, "val/cat": 1, "val/dog": 1, "test/cat": 1, "test/dog": 1})
    for i in range(12):
        (root / "train" / "cat" / f"{i:03d}.png").write_bytes(b"" if i % 2 else b"a text")
    with pytest.raises(DataError) as caught:
        attach(folder_module(root), TrainerFn.FITTING).prepare_data()
    message = str(caught.value)
    assert "found 12 that cannot" in message
    assert "and 2 more" in message
    for i in range(10):
        assert f"train/cat/{i:03d}.png (" in message
    assert "001.png (it is empty)" in message
    assert "002.png (it is no image)" in message


def test_a_fit_lists_the_unreadable_files_of_all_splits_together(image_folder):
    root = image_folder({f"{split}/{label}": 2 for split in ("train", "val", "test") for label in ("cat", "dog")})
    bad = ["train/cat/000.png", "val/dog/001.png", "test/cat/001.png"]
    for path in bad:
        (root / path).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        attach(folder_module(root), TrainerFn.FITTING).prepare_data()
    assert [path for path in bad if path not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("stage", "looks_at"),
    [
        (TrainerFn.FITTING, {"train", "val", "test"}),
        (TrainerFn.VALIDATING, {"val"}),
        (TrainerFn.TESTING, {"test"}),
        (TrainerFn.PREDICTING, {"test"}),
    ],
)
def test_a_stage_looks_at_the_images_it_will_read(image_folder, stage, looks_at):
    for split in ("train", "val", "test"):
        root = image_folder(
            {f"{s}/{label}": 1 for s in ("train", "val", "test") for label in ("cat", "dog")}, name=split
        )
        (root / split / "cat" / "000.png").write_bytes(b"")
        module = attach(folder_module(root), stage)
        if split in looks_at:
            with pytest.raises(DataError, match=rf"{split}/cat/000\.png"):
                module.prepare_data()
        else:
            module.prepare_data()


def test_a_file_that_breaks_off_is_named_before_training_and_where_it_is_read(image_folder):
    root = image_folder({"train/cat": 2, "train/dog": 2, "val/cat": 1, "test/cat": 1})
    path = root / "val" / "cat" / "000.png"
    path.write_bytes(path.read_bytes()[:-200])
    module = folder_module(root)
    with pytest.raises(DataError, match=r"val/cat/000\.png \(.*truncated"):
        attach(module, TrainerFn.FITTING).prepare_data()
    with pytest.raises(DataError, match=r"val/cat/000\.png: expected an image that can be read"):
        list(module.val_dataloader())


def test_transforms_that_do_not_fit_the_images_are_named_with_the_file(image_folder):
    root = image_folder({"cat": 6, "dog": 6})
    module = folder_module(root, train_transforms=[A.RandomCrop(400, 400)])
    with pytest.raises(DataError, match=r"data\.train_transforms: .*\.png"):
        list(module.train_dataloader())


class Recorder(LightningModule):
    """Trains one number and remembers which images it saw, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["index"].tolist()))
        return (self.weight * batch["image"].float().mean() / 255 - batch["target"].float().mean()) ** 2

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # As a learning-rate schedule does; it makes Lightning ask for the training loader early.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tiny_trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=folder, **quiet, **settings)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_trainer_refuses_unreadable_files_before_its_first_step(image_folder, tmp_path):
    root = image_folder({"train/cat": 4, "train/dog": 4, "val/cat": 1, "val/dog": 1, "test/cat": 1, "test/dog": 1})
    (root / "test" / "dog" / "000.png").write_bytes(b"")
    module = Recorder()
    with pytest.raises(DataError, match=r"test/dog/000\.png"):
        tiny_trainer(tmp_path, max_steps=1).fit(module, datamodule=folder_module(root))
    assert module.seen == []


# Resuming


def indices(batches: Iterable[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("given", [0, 1, 3, 4])
def test_a_restored_loader_gives_exactly_the_remaining_batches(image_folder, given, workers):
    root = image_folder({"cat": 12, "dog": 12})

    def loader(workers: int) -> ResumableDataLoader:
        made = folder_module(root, num_workers=workers).train_dataloader()
        assert isinstance(made, ResumableDataLoader)
        return made

    reference = loader(0)
    epochs = []
    for epoch in (2, 3):
        reference.sampler.set_epoch(epoch)
        epochs.append(list(reference))
    assert len(epochs[0]) == 4

    stopped = loader(workers)
    stopped.sampler.set_epoch(2)
    running: Iterator[dict[str, torch.Tensor]] = iter(stopped)
    assert indices(next(running) for _ in range(given)) == indices(epochs[0][:given])
    state = stopped.position
    assert state == {"epoch": 2, "batches": given}

    restored = loader(workers)
    restored.go_on_from(state)
    if given < 4:
        restored.sampler.set_epoch(2)
        rest = list(restored)
        assert indices(rest) == indices(epochs[0][given:])
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(rest, epochs[0][given:], strict=True))
        assert restored.position == {"epoch": 2, "batches": 4}
    restored.sampler.set_epoch(3)
    assert indices(restored) == indices(epochs[1])


def test_a_loader_restored_twice_in_one_epoch_counts_from_the_start_of_the_epoch(image_folder):
    root = image_folder({"cat": 12, "dog": 12})
    whole = indices(folder_module(root).train_dataloader())
    loader = folder_module(root).train_dataloader()
    loader.go_on_from({"epoch": 0, "batches": 1})
    running = iter(loader)
    next(running)
    state = loader.position
    assert state == {"epoch": 0, "batches": 2}
    again = folder_module(root).train_dataloader()
    again.go_on_from(state)
    assert indices(again) == whole[2:]


def test_a_restored_position_counts_for_its_own_epoch_and_for_one_pass(image_folder):
    root = image_folder({"cat": 12, "dog": 12})

    def restored(batches: int, epoch: int) -> ResumableDataLoader:
        loader = folder_module(root).train_dataloader()
        loader.go_on_from({"epoch": 2, "batches": batches})
        loader.sampler.set_epoch(epoch)
        return loader

    whole = indices(epoch_of(folder_module(root), 2))
    next_epoch = indices(epoch_of(folder_module(root), 3))
    assert indices(restored(1, epoch=3)) == next_epoch, "batches of another epoch were left out"
    assert indices(restored(len(whole), epoch=2)) == whole, "an epoch that was over became an empty one"
    loader = restored(1, epoch=2)
    assert indices(loader) == whole[1:]
    assert indices(loader) == whole, "the second pass left batches out, too"


def test_the_datamodule_keeps_the_position_in_its_state(image_folder):
    root = image_folder({"cat": 12, "dog": 12})
    whole = indices(folder_module(root).train_dataloader())
    stopped = folder_module(root)
    assert stopped.state_dict() == {"digest": stopped.table.digest, "position": None}
    running = iter(stopped.train_dataloader())
    next(running)
    state = stopped.state_dict()
    assert state == {"digest": stopped.table.digest, "position": {"epoch": 0, "batches": 1}}
    resumed = attach(folder_module(root), TrainerFn.FITTING)
    resumed.load_state_dict(state)
    assert indices(resumed.train_dataloader()) == whole[1:]
    # Only training goes on in the middle; a checkpoint that is tested says nothing about order.
    tested = attach(folder_module(root), TrainerFn.TESTING)
    tested.load_state_dict(state)
    assert indices(tested.train_dataloader()) == whole


def test_a_sampler_leaves_samples_out_of_one_pass_only():
    sampler = EpochSampler(numbered(9), 2, 1, training=True, seed=0)
    whole = list(sampler)
    sampler.skip = 3
    assert list(sampler) == whole[3:]
    assert list(sampler) == whole


class SaveAt(Callback):
    """Saves a checkpoint after a training step, and ends the run as Ctrl-C would."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise StoppedError


class StoppedError(Exception):
    """Stands for Ctrl-C."""


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("step", [1, 3, 4, 5], ids=["first step", "mid-epoch", "last of an epoch", "second epoch"])
def test_a_trainer_resumes_with_exactly_the_remaining_batches(image_folder, tmp_path, step):
    root = image_folder({"cat": 12, "dog": 12})
    whole, first, second = Recorder(), Recorder(), Recorder()
    tiny_trainer(tmp_path, max_epochs=3).fit(whole, datamodule=folder_module(root))
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(StoppedError):
        tiny_trainer(tmp_path, max_epochs=3, callbacks=[SaveAt(step, path)]).fit(first, datamodule=folder_module(root))
    tiny_trainer(tmp_path, max_epochs=3).fit(second, datamodule=folder_module(root), ckpt_path=path, weights_only=True)
    assert [epoch for epoch, _ in whole.seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert len(first.seen) == step
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.weight, whole.weight)
