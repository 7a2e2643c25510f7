"""No step makes the host wait for the device, so that on a GPU the next step is queued while one is computed."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from pipeline.evaluation.validation import MeanLoss
from pipeline.progress import EpochLines, ProgressBar
from pipeline.task import Batch, ClassificationTask

CLASSES, SIZE = ["a", "b", "c"], 32
RECORD = {"mean": [0.5] * 3, "std": [0.25] * 3}


def make_task(**settings: Any) -> ClassificationTask:
    return ClassificationTask(CLASSES, RECORD, "resnet20", class_shares=[0.5, 0.3, 0.2], **settings)


def make_batch(multi_label: bool = False, device: str = "cpu") -> Batch:
    target = torch.zeros(4, len(CLASSES)) if multi_label else torch.tensor([0, 1, 2, 0])
    images = torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8)
    batch = {"image": images, "target": target, "index": torch.arange(4), "weight": torch.ones(4)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


class Copies(TorchDispatchMode):
    """Counts copies from the host to a device, for which it waits unless memory was set aside for them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "cpu":
            given = [argument for argument in args if isinstance(argument, torch.Tensor)]
            # Numbers in arithmetic stand in the call itself.
            self.count += any(argument.device.type == "cpu" and argument.ndim > 0 for argument in given) or (
                func is torch.ops.aten._to_copy.default and given[0].device.type == "cpu"
            )
        return result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixing": "either"},
        {"imbalance": "weighted_loss"},
        {"imbalance": "logit_adjustment", "label_smoothing": 0.1, "dropout": 0.1},
        {"multi_label": True},
    ],
    ids=str,
)
def test_a_step_reads_nothing_from_the_device_and_copies_nothing_to_it(settings: dict[str, Any]) -> None:
    task = make_task(**settings)
    task.setup("fit")
    task.to("meta").train()  # where there are no values: whoever asks for one gets an error
    batch = make_batch(bool(settings.get("multi_label")), "meta")
    with Copies() as copies:
        for number in range(3):
            task.training_step(batch, number).backward()
    assert copies.count == 0


class Reads(TorchDispatchMode):
    """Counts values that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(steps: int, callbacks: Iterable[Callback]) -> int:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=steps,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )
    with Reads() as counted:
        batches = DataLoader([make_batch()] * steps, batch_size=None)  # type: ignore[arg-type]
        trainer.fit(make_task(), batches, batches)
    return counted.count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shown", [False, True])
def test_an_epoch_reads_as_much_from_the_device_however_many_steps_it_has(shown: bool) -> None:
    def callbacks() -> list[Callback]:
        return [EpochLines(None), *([ProgressBar()] if shown else [])]

    reads(1, callbacks())  # what is looked up once
    few, many = reads(4, callbacks()), reads(24, callbacks())
    assert many - few < 20 // 2  # a bar is brought up to date by the clock
    if not shown:
        assert many == few


def test_losses_of_an_epoch_are_means_over_images_and_not_over_batches() -> None:
    mean = MeanLoss()
    mean.update(torch.tensor(1.0), 32)
    mean.update(torch.tensor(3.0), 8)
    assert float(mean.compute()) == pytest.approx(1.4)
