"""What a person is told before training starts."""

from pathlib import Path

from lightning.pytorch import Trainer

from datamodules import ImageDataModule
from datamodules.splits import SPLITS
from pipeline.finetuning import Strategy
from pipeline.finetuning.head_alone import HeadAlone, judges_training_images
from pipeline.models.summary import count_parameters
from pipeline.planning.duration import in_words
from pipeline.planning.plan import Plan
from pipeline.task import ClassificationTask

_MOST_CLASSES = 12

# What is told of settings that are none unless someone wants more: a heading, and the effect of each value.
_EXTRAS = {
    "imbalance": (
        "imbalance",
        {
            "balanced_sampling": "every class is drawn equally often, images of rare ones again and again",
            "weighted_loss": "rare classes weigh more: more of their images are found, probabilities are distorted",
            "logit_adjustment": "the classes' shares are taken out: answers are as if classes were equally frequent",
        },
    ),
    "mixing": (
        "mixing",
        {
            "mixup": "every training image is blended with another, and so are their labels",
            "cutmix": "every training image has a rectangle of another, and its share of the labels",
            "either": "mixup or CutMix, by chance for each batch",
        },
    ),
    "test_time_augmentation": (
        "views",
        {
            "flip": "an image's probabilities are the mean of 2 views, which takes twice as long",
            "flips": "an image's probabilities are the mean of 4 views, which takes four times as long",
        },
    ),
}


def brief(
    trainer: Trainer,
    task: ClassificationTask,
    data: ImageDataModule,
    strategy: Strategy,
    monitor: tuple[str, str],
    plan: Plan,
    checkpoint: Path | None,
) -> list[str]:
    """Lines on data, network, weights and training.

    Args:
        trainer: that will train.
        task: to train.
        data: to train on.
        strategy: what is trained.
        monitor: the metric that picks the best checkpoint, and why.
        plan: what was chosen, and why.
        checkpoint: to go on from, or None.
    """
    table, hparams, network = data.table, task.hparams, task.network
    counts = [table.counts(split) for split in SPLITS]
    parts = ", ".join(f"{split} {len(table.rows(split)):,}" for split in SPLITS)
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
    judged = isinstance(strategy, HeadAlone) and checkpoint is None and judges_training_images(task)
    unmonitored = "none: nothing is held out" + ("; training images are judged by heads without them" if judged else "")
    size, millions = data.preprocessing.size, count_parameters(network) / 1e6
    return [
        f"data       {len(table.paths):,} images in {table.listing.storage.location}",
        f"classes    {len(task.classes)}{', any number an image' if hparams['multi_label'] else ''}: {classes}",
        f"split      {parts} ({how}; data digest {table.digest[:12]})",
        f"network    {hparams['backbone']}, {millions:.1f} million parameters, input {size}x{size}",
        f"weights    {weights}",
        *([] if task.lineage.origin == "scratch" else [f"licence    {task.lineage.licence_in_words} (of the weights)"]),
        f"finetuning {strategy.describe(network)}",
        *_extras(task, strategy),
        f"training   {_steps(trainer, task, data, strategy)}, precision {trainer.precision}",
        f"monitor    {f'{monitor[0]} ({monitor[1]})' if len(table.rows('val')) else unmonitored}",
        *_planned(plan),
        "",
    ]


def _planned(plan: Plan) -> list[str]:
    if not plan.choices:
        return []
    within = "" if plan.seconds is None else f"; expected to take {in_words(plan.seconds)}"
    return ["", f"plan{within}", *plan.lines()]


def _steps(trainer: Trainer, task: ClassificationTask, data: ImageDataModule, strategy: Strategy) -> str:
    if not strategy.takes_steps:
        return "no epochs"
    hparams, frozen = task.hparams, set(strategy.frozen(task.network))
    rates = [f"{hparams['head_learning_rate']:g} (head)"]
    if any(name not in frozen and not name.startswith(f"{task.head}.") for name, _ in task.network.named_parameters()):
        rates.insert(0, f"{hparams['learning_rate']:g} (backbone)")
    batches = f"batch size {data.batch_size} x {trainer.world_size}"
    return f"{trainer.max_epochs} epochs at most, {batches}, AdamW at {' and '.join(rates)}"


def _extras(task: ClassificationTask, strategy: Strategy) -> list[str]:
    without = () if strategy.takes_steps else ("mixing",)
    chosen = [(task.hparams[setting], *told) for setting, told in _EXTRAS.items() if setting not in without]
    return [f"{heading:<10} {value}: {effects[value]}" for value, heading, effects in chosen if value in effects]
