"""No training step makes the host wait for the device, so that a GPU has the next one queued while it computes one."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
    """Counts copies from the host to a device, for which it waits unless the memory is pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "cpu":
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            # A number in arithmetic goes along with the call.
            self.count += func is torch.ops.aten.lift_fresh.default or any(
                tensor.device.type == "cpu" and (copies or tensor.ndim > 0) for tensor in given
            )
        return result


@pytest.mark.parametrize(
    "copy",
    [
        lambda tensor: torch.tensor([1, 2], device=tensor.device),
        lambda tensor: torch.as_tensor(2.0, device=tensor.device),
        lambda tensor: torch.ones(3).to(tensor.device),
        lambda tensor: tensor[torch.tensor([0, 1])],
        lambda tensor: tensor[[0, 1]],
        lambda tensor: tensor.copy_(torch.ones(3)),
    ],
)
def test_the_usual_copies_are_seen(copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with Copies() as copies:
        copy(torch.ones(3, device="meta") * 2)
    assert copies.count == 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixing": "either"},
        {"imbalance": "weighted_loss"},
        {"imbalance": "logit_adjustment", "dropout": 0.1},
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
def test_an_epoch_reads_as_much_from_the_device_however_many_steps_it_has(
    shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.progress._REFRESHED", math.inf)  # the clock says when a bar reads, not the steps

    def callbacks() -> list[Callback]:
        return [EpochLines(None), *([ProgressBar()] if shown else [])]

    few, many = reads(4, callbacks()), reads(24, callbacks())
    assert many == few > 0


def test_losses_of_an_epoch_are_means_over_images_and_not_over_batches() -> None:
    mean = MeanLoss()
    mean.update(torch.tensor(1.0), 32)
    mean.update(torch.tensor(3.0), 8)
    assert float(mean.compute()) == pytest.approx(1.4)
