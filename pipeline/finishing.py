"""What becomes of a trained network before it is tested: one checkpoint, the best that this run can hand over."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from torch import Tensor, nn

from datamodules import ImageDataModule
from pipeline.checkpoints import INTERPOLATED, PASSED_OVER, derive_checkpoint, read_checkpoint
from pipeline.evaluation.calibration import fit_temperature, tempered
from pipeline.evaluation.comparison import paired_differences
from pipeline.evaluation.familiarity import Familiarity
from pipeline.evaluation.predictions import Predictions, to_probabilities
from pipeline.finetuning.features import task_features
from pipeline.finetuning.head_alone import HeadAlone
from pipeline.finetuning.interpolation import USUAL_SHARE, StartingPoint, between, choose_share
from pipeline.finetuning.solving import held_out_together
from pipeline.models.backbones import describe, described_by_head
from pipeline.models.modes import evaluating
from pipeline.precision import computing
from pipeline.runs import BEST, LAST, START
from pipeline.task import ClassificationTask

# Validation images that are asked how far to go along a line: more of them choose no better.
_ASKED = 256
#: Validation images that are asked to choose between two epochs. So many see half a point: the last ones differ in some
#: 5 % of their answers, and the square root of 0.05 / 2,000 is 0.005.
ASKED_OF_EPOCHS = 2_000
#: Images of each kind, trained on and held out, that say what is familiar; of fewer references all look stranger.
ASKED_OF_FAMILIARITY = 500
#: With fewer held-out images nothing could be found strange.
LEAST_HELD_OUT = 20
_NETWORK = "network."  # before the names of its tensors in a checkpoint


def saw_the_start(folder: Path) -> bool:
    """Whether a run has kept the network that its training began with, or made its best checkpoint of it already."""
    best = folder / BEST
    return (folder / START).is_file() or (best.is_file() and INTERPOLATED in read_checkpoint(best))


def interpolated_checkpoint(
    trainer: Trainer,
    task: ClassificationTask,
    data: ImageDataModule,
    folder: Path,
    start: StartingPoint,
    validates: bool,
) -> tuple[Path, float]:
    """Make the best checkpoint of what lies between the first and the last network, once.

    Args:
        trainer: done with the training.
        task: that was trained.
        data: whose validation images are asked.
        folder: of the run, with its last checkpoint.
        start: where training began.
        validates: whether there are validation images; without them, the usual share of the way is gone.

    Returns:
        The checkpoint, and how much of the way was gone.
    """
    best = folder.resolve() / BEST
    # By this run, before it was interrupted.
    done = read_checkpoint(best).get(INTERPOLATED) if best.is_file() else None
    # Asked by all processes before the first one writes.
    trainer.strategy.barrier()
    if done is None and trainer.is_global_zero:
        first, end = start.read(), _network(read_checkpoint(folder / LAST))
        share = USUAL_SHARE
        if validates:
            share = choose_share(first, end, _Validation(trainer, task, data, _ASKED))
        state = {f"{_NETWORK}{name}": tensor for name, tensor in between(first, end, share).items()}
        derive_checkpoint(folder / LAST, best, {INTERPOLATED: share}, state)
    trainer.strategy.barrier()
    return best, read_checkpoint(best)[INTERPOLATED]


def settled_checkpoint(
    trainer: Trainer, task: ClassificationTask, data: ImageDataModule, folder: Path
) -> tuple[Path, int | None]:
    """Give up the epoch with the best metric for the last one, unless it answers better by more than chance.

    The learning rate falls to zero at the last epoch, which therefore is nearly always as good as any; of a few hundred
    validation images the metric of an earlier one is easily the best, and its network clearly worse on others. So the
    earlier one has to be less surprised by the validation images, each at its own temperature, with 97.5 % confidence
    (of the paired bootstrap, over groups where there are any).

    Args:
        trainer: done with the training.
        task: that was trained.
        data: whose validation images are asked.
        folder: of the run, with its best and its last checkpoint.

    Returns:
        The checkpoint, and which epoch, counted from 1, was given up for the last one; None: it is the best one's.
    """
    best, last = (folder.resolve() / name for name in (BEST, LAST))
    earlier, final = read_checkpoint(best), read_checkpoint(last)
    # Asked by all processes before the first one writes.
    trainer.strategy.barrier()
    if trainer.is_global_zero and earlier["global_step"] < final["global_step"]:
        validation = _Validation(trainer, task, data, ASKED_OF_EPOCHS)
        one, other = (_at_its_temperature(validation(_network(content))) for content in (earlier, final))
        if paired_differences(one, other, validation.groups)["log_loss"].low <= 0:
            derive_checkpoint(last, best, {PASSED_OVER: earlier["epoch"] + 1})
    trainer.strategy.barrier()
    return best, read_checkpoint(best).get(PASSED_OVER)


def answers_out_of_fold(
    trainer: Trainer, task: ClassificationTask, data: ImageDataModule, probe: HeadAlone
) -> tuple[list[int], Predictions] | None:
    """What is answered to training images by heads that have not seen them.

    They were solved as the head that is handed over, on four fifths of the images or on all but one; what was chosen by
    all of them is its penalty, and of a head that answers by distances its width and scale.

    Args:
        trainer: done with the training.
        task: with the network that is handed over.
        data: with the images.
        probe: by which the head was solved.

    Returns:
        Rows of the training images, and the predictions, at temperature 1; None where no image can be judged (see
        :meth:`~pipeline.finetuning.head_alone.HeadAlone.judge_out_of_fold`).
    """
    task.to(trainer.strategy.root_device)
    logits = probe.judge_out_of_fold(trainer, task, data).double()
    rows = (~logits.isnan().any(1)).nonzero().squeeze(1)
    if not len(rows):
        return None
    several = task.hparams["multi_label"]
    targets = data.plain("train").targets[rows.numpy()].astype(np.int64)
    return rows.tolist(), Predictions(targets, to_probabilities(logits[rows], several).numpy(), several)


def measure_familiarity(
    trainer: Trainer, task: ClassificationTask, data: ImageDataModule, probe: HeadAlone | None
) -> Familiarity | None:
    """What says whether an image is of the kind that the task was trained on.

    Where too few images are held out, and the backbone has not seen the training images, these are as good, each held
    out from the others.

    Args:
        trainer: in whose precision the network computes.
        task: with the network that is handed over.
        data: whose training and validation images are looked at, up to 500 of each.
        probe: by which the head was solved, and the backbone left as it was; None: training has moved it.

    Returns:
        None where there are too few of either.
    """
    held_out = len(data.table.rows("val")) >= LEAST_HELD_OUT
    unmoved = probe is not None and probe.penalty is not None and not task.lineage.trained_here
    if not held_out and not unmoved:
        return None
    task.to(trainer.strategy.root_device)
    with tempfile.TemporaryDirectory() as scratch:
        # No other run will have a network that was trained.
        folder = Path(scratch) if probe is None else probe.folder
        if held_out:
            trained, others = (_stages(trainer, task, data, split, folder) for split in ("train", "val"))
            return Familiarity.measured(trained, others)
        asked = data.images("train").at(_chosen(task, data, "train"))
        units = held_out_together(asked.contents(folder / "contents.npy"), asked.groups)
        if len(set(units)) < LEAST_HELD_OUT:
            return None
        return Familiarity.among(_stages(trainer, task, data, "train", folder), units)


def _chosen(task: ClassificationTask, data: ImageDataModule, split: str) -> NDArray[np.int64]:
    """Rows of the images of a split that say what is familiar, among those that can be read."""
    order = np.random.default_rng(task.hparams["seed"]).permutation(len(data.plain(split)))
    return np.sort(order[:ASKED_OF_FAMILIARITY])


def _stages(
    trainer: Trainer, task: ClassificationTask, data: ImageDataModule, split: str, folder: Path
) -> tuple[Tensor, ...]:
    """What the network makes of some images of a split, stage by stage."""
    images, chosen, hparams = data.plain(split), _chosen(task, data, split), task.hparams
    found = task_features(
        task,
        lambda rows: data.plain_batches(images, chosen[list(rows)].tolist()),
        data.images(split).at(chosen).contents(folder / "contents.npy"),
        folder,
        partial(data.progress, "features"),
        str(trainer.precision),
        trainer.precision_plugin.forward_context,
        # What a head classifies, a solved one has left in the cache.
        part=None if described_by_head(hparams["backbone"], hparams["head_stages"]) else ("stages", _joined),
    )
    record = data.preprocessing
    empty = torch.zeros(1, record.channels, record.size, record.size, device=task.device)
    with evaluating(task.network), torch.inference_mode():
        widths = [stage.shape[1] for stage in describe(task.network, empty)[1]]
    return torch.from_numpy(found).to(task.device).split(widths, dim=1)


def _joined(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([stage.float() for stage in describe(network, images)[1]], dim=1)


def _network(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    state = checkpoint["state_dict"]
    return {name.removeprefix(_NETWORK): tensor for name, tensor in state.items() if name.startswith(_NETWORK)}


def _at_its_temperature(predictions: Predictions) -> Predictions:
    return tempered(predictions, fit_temperature(predictions))


class _Validation:
    """Answers of any state of a task's network to some validation images, which are read once."""

    def __init__(self, trainer: Trainer, task: ClassificationTask, data: ImageDataModule, asked: int) -> None:
        images = data.plain("val")
        chosen = np.sort(np.random.default_rng(task.hparams["seed"]).permutation(len(images))[:asked])
        self.groups = data.images("val").at(chosen).groups
        self.task = task.to(trainer.strategy.root_device)  # which the trainer took it from when training was over
        self.precision = str(trainer.precision)
        self.targets = images.targets[chosen].astype(np.int64)
        self.batches = list(data.plain_batches(images, chosen.tolist()))

    def __call__(self, state: dict[str, torch.Tensor]) -> Predictions:
        task = self.task
        task.network.load_state_dict(state)
        parts: list[Any] = []
        with evaluating(task.network), torch.inference_mode(), computing(self.precision, task.device.type):
            for images in self.batches:
                logits = task(images.to(task.device)).double()
                parts.append(to_probabilities(logits, task.hparams["multi_label"]).cpu())
        return Predictions(self.targets, torch.cat(parts).numpy(), task.hparams["multi_label"])
