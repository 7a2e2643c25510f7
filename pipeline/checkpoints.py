"""Finding checkpoints, and reading what they say of their model."""

from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError, near_matches
from pipeline.models.files import is_own_checkpoint
from pipeline.runs import BEST, newest_checkpoint

#: Under which a checkpoint keeps the temperature of its probabilities, and notes that it was fitted.
TEMPERATURE, CALIBRATED = "temperature", "calibrated"
#: Under which it notes how far it lies from where training began, as a share of the way to where it ended.
INTERPOLATED = "interpolated"
#: Under which it notes which epoch, counted from 1, was better than the one that it is of, but only by chance.
PASSED_OVER = "passed_over"


def existing_checkpoint(given: str | None, in_folder: str = BEST, flag: str = "--ckpt_path") -> Path:
    """The checkpoint file that a person named.

    Args:
        given: a file, or a run's folder.
        in_folder: which checkpoint of a folder is meant.
        flag: by which it was named.

    Raises:
        UserError: none was named, or it is not there; the newest one below ``runs`` is suggested.
    """
    newest = newest_checkpoint()
    hint = f"the newest run's is {newest}" if newest else "train one with `python -m pipeline fit`"
    if given is None:
        raise UserError(f"{flag}: expected the checkpoint of a trained model, found none; {hint}.")
    if given == "last":
        raise UserError(f"{flag} last: expected a file or a run folder here, found what is for fit alone; {hint}.")
    path = Path(given).expanduser()
    if path.is_dir():
        path = path / in_folder
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"{flag}: expected a file, found nothing at '{path}'; {near_matches(path.name, siblings)}{hint}."
        )
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, its tensors left on disk; ``hyper_parameters`` has the arguments of the task.

    Raises:
        UserError: the file is damaged, holds other objects than tensors and plain values, or is none of ours.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if is_own_checkpoint(content):
            return content
        found = "one of another origin"
    except Exception as error:  # torch raises many types for damaged and unsafe files
        found = f"one that cannot be read as such ({type(error).__name__})"
    raise UserError(
        f"--ckpt_path: expected a checkpoint written by `python -m pipeline fit` at '{path}', found {found}; for "
        "weights of another origin use model.weights."
    )


def require_finite(path: Path) -> None:
    """Refuse what a training that went astray has left.

    Args:
        path: of a checkpoint of ours.

    Raises:
        UserError: a number in it is infinite or none.
    """
    for name, tensor in read_checkpoint(path)["state_dict"].items():
        if not tensor.isfinite().all():
            raise UserError(
                f"training: expected finite weights at its end, found others ('{name}' in '{path}'): steps that were "
                "too large, or too few bits; lower model.learning_rate and model.head_learning_rate, or set "
                "trainer.precision to 32-true."
            )


def calibrate_checkpoint(path: Path, temperature: float, measured: dict[str, Any] | None = None) -> None:
    """Write what was fitted on held-out images into a checkpoint; the file is the old one or the new one at any moment.

    Args:
        path: of the checkpoint.
        temperature: of its probabilities.
        measured: what else is kept, by name.
    """
    content = read_checkpoint(path)
    content["state_dict"][TEMPERATURE] = torch.tensor(temperature)
    content[CALIBRATED] = True
    _write({**content, **(measured or {})}, path)


def derive_checkpoint(last: Path, best: Path, note: dict[str, Any], state: dict[str, Any] | None = None) -> None:
    """Write a checkpoint as the last one, with a note; ``best`` is whole at any moment.

    Args:
        last: checkpoint to copy.
        best: file to write.
        note: kept beside what the checkpoint says already.
        state: tensors to put in their places; none: all stay as they are.
    """
    content = read_checkpoint(last)
    content["state_dict"] = {**content["state_dict"], **(state or {})}
    _write({**content, **note}, best)


def _write(content: dict[str, Any], path: Path) -> None:
    unfinished = path.with_suffix(".part")
    torch.save(content, unfinished)
    unfinished.replace(path)


def is_trained_to_the_end(content: dict[str, Any], max_epochs: int) -> bool:
    """Whether a checkpoint has as many epochs behind it as are asked for."""
    loop = content["loops"]["fit_loop"]
    # (What the trainer calls the epoch is one less at an epoch's end than after the training.)
    begun, whole = loop["epoch_progress"]["current"]["ready"], loop["epoch_loop.batch_progress"]["is_last_batch"]
    return begun - (not whole) >= max_epochs
