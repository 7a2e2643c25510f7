"""Finding checkpoints, and reading what they say of their model."""

from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError, near_matches
from pipeline.runs import BEST, newest_checkpoint


def existing_checkpoint(given: str | None) -> Path:
    """The checkpoint file that a person named.

    Raises:
        UserError: none was named, or it is not there; the newest one below ``runs`` is suggested.
    """
    newest = newest_checkpoint()
    hint = f"the newest run's is {newest}" if newest else "train one with `python -m pipeline fit`"
    if given is None:
        raise UserError(f"--ckpt_path: expected the checkpoint of a trained model, found none; {hint}.")
    path = Path(given).expanduser()
    if path.is_dir():
        path = path / BEST
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"--ckpt_path: expected a file, found nothing at '{path}'; {near_matches(path.name, siblings)}{hint}."
        )
    return path


def hyperparameters(path: Path) -> dict[str, Any]:
    """The arguments of the task that a checkpoint holds: classes, preprocessing, backbone and more.

    Raises:
        UserError: the file is damaged, holds other objects than tensors and plain values, or is none of ours.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        hparams = content["hyper_parameters"]
        if not {"classes", "preprocessing", "backbone"} <= set(hparams):
            raise KeyError("classes, preprocessing or backbone")
    except Exception as error:  # torch raises many types for damaged and unsafe files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(
            f"--ckpt_path: expected a checkpoint written by `python -m pipeline fit`, found another file at '{path}' "
            f"({type(error).__name__}: {reason}); for weights of another origin use model.weights."
        ) from error
    return dict(hparams)
