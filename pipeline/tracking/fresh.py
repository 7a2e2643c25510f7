"""A fresh local store, copied from an empty one.

MLflow makes the tables of a new SQLite file by repeating every migration of its history, which takes seconds; so that
is done once for each of its releases.
"""

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from pipeline.home import cache_home


def lay_out(file: Path) -> None:
    """Put the tables of this release of MLflow, with nothing in them, where there is no store yet.

    What is there is left as it is. Nothing is done, and MLflow does it, where the empty store cannot be made or kept,
    or the file system of the new one has no links.

    Args:
        file: of the new store.
    """
    if file.exists():
        return
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with _beside(file) as copy:
            _copy(_empty_store(), copy)
            os.link(copy, file)  # which fails where somebody was quicker
    except (OSError, sqlite3.Error, SQLAlchemyError, MlflowException):
        return


def _empty_store() -> Path:
    """The empty store of this release, made where it is missing."""
    import mlflow
    from mlflow.db import upgrade

    kept = cache_home("stores") / f"mlflow-{mlflow.__version__}.db"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        if not kept.is_file():
            with _beside(kept) as made:
                upgrade.callback(f"sqlite:///{made}")  # as `mlflow db upgrade` does
                made.rename(kept)
    return kept


def _copy(source: Path, target: Path) -> None:
    """As SQLite copies, which knows of what it keeps beside a file."""
    with contextlib.closing(sqlite3.connect(source)) as read, contextlib.closing(sqlite3.connect(target)) as written:
        read.backup(written)


@contextlib.contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """A name in the same file system for what is not complete."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-", ignore_cleanup_errors=True) as folder:
        yield Path(folder) / file.name
