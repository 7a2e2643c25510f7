"""What a person is told before training starts."""

from pathlib import Path

from lightning.pytorch import Trainer

from datamodules import ImageDataModule
from datamodules.splits import SPLITS
from pipeline.finetuning import Strategy
from pipeline.models.summary import count_parameters
from pipeline.task import ClassificationTask

_MOST_CLASSES = 12


def brief(
    trainer: Trainer,
    task: ClassificationTask,
    data: ImageDataModule,
    strategy: Strategy,
    monitor: tuple[str, str],
    precision_reason: str | None,
    checkpoint: Path | None,
) -> list[str]:
    """Lines on data, network, weights and training.

    Args:
        trainer: that will train.
        task: to train.
        data: to train on.
        strategy: what is trained.
        monitor: the metric that picks the best checkpoint, and why.
        precision_reason: why the precision was picked; None where a person set it.
        checkpoint: to go on from, or None.
    """
    table, hparams, network = data.table, task.hparams, task.network
    counts = [table.counts(split) for split in SPLITS]
    parts = ", ".join(f"{split} {sum(count.values()):,}" for split, count in zip(SPLITS, counts, strict=True))
    shown = task.classes[:_MOST_CLASSES]
    classes = "; ".join(f"{name} {sum(count[name] for count in counts):,}" for name in shown)
    classes += "; ..." if len(task.classes) > len(shown) else ""
    division = data.division
    how = f"drawn here, split_seed {division.seed}" if table.split_is_ours else "as given"
    how = f"fold {division.fold}, {how}" if division.fold is not None else how
    groups = table.listing.groups
    how += f", {len(set(groups)):,} groups" if groups is not None else ""
    if checkpoint is not None:
        weights = f"going on from {checkpoint}"
    else:
        weights = f"{task.lineage}: {task.load_report}" if task.load_report else "none: training from scratch"
    size, millions = data.preprocessing.size, count_parameters(network) / 1e6
    precision = trainer.precision if precision_reason is None else f"{trainer.precision} ({precision_reason})"
    rates = [f"{hparams['head_learning_rate']:g} (head)"]
    frozen = set(strategy.frozen(network))
    if any(name not in frozen and not name.startswith(f"{task.head}.") for name, _ in network.named_parameters()):
        rates.insert(0, f"{hparams['learning_rate']:g} (backbone)")
    return [
        f"data       {len(table.paths):,} images in {table.listing.storage.location}",
        f"classes    {len(task.classes)}: {classes}",
        f"split      {parts} ({how}; data digest {table.digest[:12]})",
        f"network    {hparams['backbone']}, {millions:.1f} million parameters, input {size}x{size}",
        f"weights    {weights}",
        *([] if task.lineage.origin == "scratch" else [f"licence    {task.lineage.licence_in_words} (of the weights)"]),
        f"finetuning {strategy.describe(network)}",
        f"training   {trainer.max_epochs} epochs at most, batch size {data.batch_size} x {trainer.world_size}, "
        f"AdamW at {' and '.join(rates)}, precision {precision}",
        f"monitor    {monitor[0]} ({monitor[1]})",
        "",
    ]
