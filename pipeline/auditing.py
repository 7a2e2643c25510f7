"""``python -m pipeline audit``: what is wrong with the data, before anything is trained on it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules import ImageDataModule
from datamodules.audit import Inspection, audit, findings, inspect, write_report
from datamodules.audit.audit import Augmented
from datamodules.audit.inspection import as_rgb
from datamodules.decode import decode
from pipeline.exits import FOUND, SUCCESS
from pipeline.finetuning.features import task_features
from pipeline.parsing import BESIDE_FIT, Parser
from pipeline.progress import Meter, say
from pipeline.task import ClassificationTask
from pipeline.untrained import UntrainedCLI

Progress = Callable[[int, int], None]

#: Training images that the report shows augmented, and how often each.
_SHOWN, _TIMES = 6, 6


def run_audit(arguments: Sequence[str], terminal: bool, started: float) -> int:
    """Look for unreadable images, copies, leaks and wrong labels; write a page and a JSON file.

    Labels are judged, and near copies compared, by features of the network that ``model.weights`` names; without
    weights, or where they cannot be reached, that part is left out and the reason said.

    Args:
        arguments: of this command; those it does not know are settings of ``fit``.
        terminal: whether a person is looking.
        started: ``time.perf_counter()`` when the program started.

    Returns:
        The exit code: 3 with ``--strict`` where an image cannot be read, or stands in more than one split.

    Raises:
        UserError: an argument is wrong.
        DataError: the data is not as described.
    """
    parser = Parser("audit", "Find out what is wrong with the data before training on it.", BESIDE_FIT)
    parser.add_argument("--to", default="audit", metavar="FOLDER", help="where the report is written; default: audit")
    parser.add_argument(
        "--strict", action="store_true", help="end with exit code 3 where images are unreadable or cross the splits"
    )
    own, others = parser.parse_known_args(arguments)
    cli = UntrainedCLI(["fit", *others, "--model.weights_fallback=scratch"], terminal, started)
    data, task, meter = cli.datamodule, cli.model, Meter(terminal)
    table, record = data.table, data.preprocessing
    read = partial(decode, channels=record.channels, dtype=record.dtype)
    storage = table.listing.storage
    inspection = inspect(storage, table.paths, read, partial(meter, "reading"))
    of_network = None
    if task.load_report is not None:
        of_network = _features(task, data, inspection, Path(own.to) / "features", partial(meter, "features"))
    found = audit(
        table,
        inspection=inspection,
        features=of_network,
        decode=read,
        augmented=_augmented(data, inspection),
        progress=meter,
        seed=data.seed,
    )
    page, content = write_report(found, Path(own.to))
    say(f"{len(table.paths):,} images in {storage.location}")
    if of_network is None:
        reason = task.fallback_reason or "model.weights is not set"
        say(f"labels      not judged, and copies compared by their pixels alone: {reason}")
    for finding in findings(found):
        say(f"{finding.level:<11} {finding.title}")
    say(f"\nreport      {page}\n            {content}")
    if own.strict and not found.passed:
        say("strict      images are unreadable or stand in more than one split")
        return FOUND
    return SUCCESS


def _features(
    task: ClassificationTask, data: ImageDataModule, inspection: Inspection, folder: Path, progress: Progress
) -> NDArray[np.float32]:
    """Of every image, float32 ``(N, F)``; not finite where it cannot be read."""
    rows = np.flatnonzero(inspection.readable)
    dataset = data.everything()

    def read_images(wanted: Sequence[int]) -> Iterator[Tensor]:
        return data.plain_batches(dataset, rows[wanted].tolist())

    task.to("cuda" if torch.cuda.is_available() else "cpu")
    found = task_features(task, read_images, [inspection.facts[row].digest for row in rows], folder, progress)
    whole = np.full((len(inspection.facts), found.shape[1]), np.nan, np.float32)
    whole[rows] = found
    return whole


def _augmented(data: ImageDataModule, inspection: Inspection) -> list[Augmented]:
    """Some training images, as they are and as training will see them."""
    dataset = data.dataset("train")
    shown: list[Augmented] = []
    usable = [index for index, row in enumerate(dataset.rows) if inspection.readable[row]]
    for place in np.unique(np.linspace(0, len(usable) - 1, min(_SHOWN, len(usable))).astype(int)):
        index = usable[place]
        seen: list[Any] = [dataset[(epoch, index, 0)]["image"].permute(1, 2, 0).numpy() for epoch in range(_TIMES)]
        shown.append((as_rgb(dataset.open(index).pixels()), [as_rgb(image) for image in seen]))
    return shown
