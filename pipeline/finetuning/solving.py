"""A head that is solved, not trained: on features of the training images, under the network as it stands."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.finetuning.features import in_batches, task_features
from pipeline.finetuning.kernel_ridge import KernelRidge, fit_kernel_ridge
from pipeline.finetuning.probe import Probe, as_truth, deal_folds, fit_probe, join_folds, judge_out_of_fold
from pipeline.finetuning.statistics import measure_statistics
from pipeline.finetuning.strategy import Strategy
from pipeline.home import cache_home
from pipeline.models import backbones
from pipeline.models.kernel_head import match_head

# Groups that a content joins which is in all of them.
_MOST_JOINED = 3
# Augmented training images that statistics are measured on, and how many are normalised together.
_MEASURED, _MEASURED_TOGETHER = 256, 64


class PlainImages(Protocol):
    """What is asked of a datamodule (:class:`~datamodules.base.ImageDataModule` has it)."""

    progress: Any

    @property
    def turns(self) -> Mapping[str, Callable[[Tensor], Tensor]]: ...
    def dataset(self, split: str) -> Any: ...
    def plain(self, split: str) -> Any: ...
    def plain_batches(self, dataset: Any, indices: Sequence[int]) -> Iterator[Tensor]: ...
    def images(self, split: str) -> Any: ...


class SolvedHead(Strategy):
    """Puts the best linear classifier of the features in the head's place before the first step.

    The features are those of the training images as evaluation prepares them, under the network as it was loaded; they
    are kept on disk, and a later run with the same images and weights computes none. A run that goes on from a
    checkpoint keeps the head that it finds there.

    Args:
        features: folder where features are kept; none: below ``~/.cache``.

    Raises:
        UserError: the head is not linear, or there is no datamodule to take images from.
    """

    needs_weights = True
    #: Whether batch normalisations are first measured on the training images.
    measures = False
    #: Whether the head is solved on what the images may be turned into, too.
    turns = False

    def __init__(self, features: str | None = None) -> None:
        self.folder = cache_home("features") if features is None else Path(features).expanduser()
        #: That was chosen for the head; None until it is solved, and in processes that did not solve it.
        self.penalty: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is None:
            # One process solves it, so that all of them start with the same bits.
            start = trainer.strategy.broadcast(self._start(trainer, pl_module) if trainer.is_global_zero else None)
            assert start is not None
            network: nn.Module = pl_module.network  # type: ignore[assignment]
            match_head(network, pl_module.head, start)  # type: ignore[arg-type]
            network.load_state_dict(start, strict=False)
        # From here on, what is frozen is not to move.
        super().on_train_start(trainer, pl_module)

    def _start(self, trainer: Trainer, task: Any) -> dict[str, Tensor]:
        """What the training starts with instead of what was loaded."""
        data = _images_for(type(self).__name__, trainer, task)
        statistics = training_statistics(trainer, task, data) if self.measures else {}
        task.network.load_state_dict(statistics, strict=False)
        head = self._solve(trainer, task, data)
        return statistics | {f"{task.head}.{name}": tensor for name, tensor in head.items()}

    def _solve(self, trainer: Trainer, task: Any, data: PlainImages) -> dict[str, Tensor]:
        """The tensors of the solved head, by their names in it."""
        probe = solve_head(trainer, task, data, self.folder, self._others(data))
        self.penalty = probe.penalty
        return {"weight": probe.weight, "bias": probe.bias}

    def _others(self, data: PlainImages) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Views of each image that the head is solved on beside itself."""
        return data.turns if self.turns else {}


def _images_for(strategy: str, trainer: Trainer, task: Any) -> PlainImages:
    """The trainer's datamodule, where a head can be solved at all."""
    if not backbones.has_linear_head(task.network, len(task.hparams["preprocessing"]["mean"])):
        kind = type(task.network.get_submodule(task.head)).__name__
        found = "Linear behind other layers" if kind == "Linear" else kind
        raise UserError(
            f"finetuning: expected a network whose head is linear for {strategy}, found {found} in "
            f"'{task.hparams['backbone']}'; set finetuning to FullFineTuning."
        )
    data: PlainImages | None = trainer.datamodule  # type: ignore[attr-defined]
    if data is None:
        raise UserError(
            f"finetuning: expected a datamodule for {strategy}, which looks at the training images before it trains, "
            "found loaders alone; pass datamodule to Trainer.fit, or set finetuning to FullFineTuning."
        )
    return data


def training_statistics(trainer: Trainer, task: Any, data: PlainImages) -> dict[str, Tensor]:
    """Statistics of the network's batch normalisations on some training images, augmented as in training.

    Args:
        trainer: whose precision the network computes in.
        task: a :class:`~pipeline.task.ClassificationTask`; its network is left as it is.
        data: whose training images are looked at, some of them repeatedly where there are few.

    Returns:
        See :func:`~pipeline.finetuning.statistics.measure_statistics`.
    """
    images, rng = data.dataset("train"), np.random.default_rng(task.hparams["seed"])
    order = np.concatenate([rng.permutation(len(images)) for _ in range(-(-_MEASURED // len(images)))])[:_MEASURED]

    def embed(batch: Tensor) -> None:
        with trainer.precision_plugin.forward_context():
            backbones.features(task.network, task.normalise(batch.to(task.device)))

    batches = in_batches(data.plain_batches(images, order.tolist()), _MEASURED_TOGETHER)
    return measure_statistics(task.network, embed, batches)


def solve_head(
    trainer: Trainer,
    task: Any,
    data: PlainImages,
    folder: Path,
    others: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> Probe:
    """The best linear classifier of the training images' features.

    Args:
        trainer: whose precision the network computes in.
        task: a :class:`~pipeline.task.ClassificationTask`.
        data: with the images.
        folder: where features are kept.
        others: views of each image beside itself: how they are called, and how they are made of ``(B, C, H, W)``.
    """
    seen = _Seen.of(trainer, task, data, folder, others)
    classes, seed = len(task.classes), task.hparams["seed"]
    widths = backbones.feature_widths(task.network)
    probe = fit_probe(
        seen.features, seen.targets, classes, seen.weights, seen.units, seed=seed, widths=widths, views=seen.views
    )
    return replace(probe, bias=probe.bias + _offsets(task))


def solve_kernel_head(trainer: Trainer, task: Any, data: PlainImages, folder: Path) -> KernelRidge:
    """The best classifier by distances of the training images' features; arguments as for :func:`solve_head`."""
    seen = _Seen.of(trainer, task, data, folder, {})
    widths = backbones.feature_widths(task.network)
    head = fit_kernel_ridge(
        seen.features, seen.targets, len(task.classes), seen.weights, seen.units, task.hparams["seed"], widths
    )
    offsets = _offsets(task)
    return replace(head, bias=head.bias + offsets, left_out=head.left_out + offsets)


def judge_training_images(
    trainer: Trainer,
    task: Any,
    data: PlainImages,
    folder: Path,
    penalty: float,
    others: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> Tensor:
    """What heads as :func:`solve_head` solves them say of training images that they have not seen.

    2,000 images at most are dealt into up to five folds, and each is judged by a head that was solved without its fold.
    Where they leave four fifths to a single head, as of 10,000 images without groups, they are one fold.

    Args:
        trainer: as for :func:`solve_head`, and so are the arguments that are not named here.
        task: whose network has the backbone that the head was solved on.
        data: with the images.
        folder: where features are kept.
        penalty: that was chosen for the head.
        others: views of each image beside itself.

    Returns:
        Logits of the training images, float32 ``(N, C)``; NaN where an image is not judged (see
        :func:`~pipeline.finetuning.probe.judge_out_of_fold`).
    """
    seen = _Seen.of(trainer, task, data, folder, others)
    count, classes = len(seen.features) // seen.views, len(task.classes)
    folds = deal_folds(as_truth(seen.targets[:count], classes), seen.units[:count], task.hparams["seed"])
    if folds is None:
        return torch.full((count, classes), torch.nan)
    # The other views are solved on, and not judged.
    unjudged = torch.full((len(seen.features) - count,), -1)
    folds = torch.cat([join_folds(folds, seen.units[:count]), unjudged])
    widths = backbones.feature_widths(task.network)
    logits = judge_out_of_fold(
        seen.features, seen.targets, classes, penalty, folds, seen.units, seen.weights, widths, seen.views
    )
    return logits[:count] + _offsets(task)


@dataclass(frozen=True)
class _Seen:
    """Training images as a head sees them: all of them, then all of them in another view, and so on.

    Attributes:
        features: float32 ``(views x N, F)``.
        targets: of each row, int64 ``(views x N,)``, or float ``(views x N, C)`` of 0 and 1.
        weights: of each row in the loss, float ``(views x N,)``; None: all alike.
        units: what rows share that are held out together, ``views x N``: views and copies of an image, images of a
            group.
        views: of each image.
    """

    features: Tensor
    targets: Tensor
    weights: Tensor | None
    units: list[int]
    views: int

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        task: Any,
        data: PlainImages,
        folder: Path,
        others: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> "_Seen":
        """Features come from the folder, or are computed and kept there."""
        plain, images = data.plain("train"), data.images("train")
        digests = images.contents(folder / "contents.npy")
        found = [
            task_features(
                task,
                partial(data.plain_batches, plain),
                digests,
                folder,
                partial(data.progress, "features"),
                str(trainer.precision),
                trainer.precision_plugin.forward_context,
                turn,
            )
            for turn in (None, *others.items())
        ]
        views = len(found)
        return cls(
            torch.from_numpy(np.concatenate(found)),
            torch.from_numpy(np.concatenate([plain.targets] * views)),
            None if plain.weights is None else torch.from_numpy(np.tile(plain.weights, views)),
            held_out_together(digests, images.groups) * views,
            views,
        )


def held_out_together(digests: Sequence[str], groups: Sequence[str] | None) -> list[int]:
    """What images share that are held out together: a group or, without one, the content, of which there may be copies.

    Args:
        digests: of the images' contents, ``N``.
        groups: of the same images, ``N``; empty where one has none; None: none has any.

    Returns:
        Of each image a number, ``N``; equal for those that belong together, by way of others, too: copies join the
        groups that they are in, unless these are so many that it is a filler (a black frame, a colour card).

    Example:
        >>> held_out_together(["a", "b", "a", "c"], ["one", "one", "two", ""])
        [0, 0, 0, 1]
    """
    count = len(digests)
    own = [""] * count if groups is None else [group.strip() for group in groups]
    found_in: defaultdict[str, set[str]] = defaultdict(set)
    for digest, group in zip(digests, own, strict=True):
        found_in[digest].add(group)
    # Images are linked to their content and their group, which are numbered behind them.
    number: dict[tuple[str, str], int] = {}
    links: list[tuple[int, int]] = []
    for image, (digest, group) in enumerate(zip(digests, own, strict=True)):
        shared = [("group", group)] if group else []
        if not group or len(found_in[digest]) <= _MOST_JOINED:
            shared.append(("content", digest))
        links += [(image, count + number.setdefault(what, len(number))) for what in shared]
    graph = coo_array((np.ones(len(links)), np.array(links).T), shape=[count + len(number)] * 2)
    return connected_components(graph, directed=False)[1][:count].tolist()


def _offsets(task: Any) -> Tensor:
    """What training towards other shares of the classes adds to their logits, ``(C,)`` or ``(1,)``.

    Classes that weigh ``w`` times as much have ``w`` times the odds.
    """
    objective = task.objective
    offsets: Tensor = objective.class_weights.log() - objective.adjustment
    if task.hparams["imbalance"] == "balanced_sampling" and not task.hparams["multi_label"]:
        offsets = offsets - torch.tensor(task.class_shares, device=offsets.device).log()
    return offsets.cpu()
