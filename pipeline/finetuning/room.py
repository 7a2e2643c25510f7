"""Room for kept features: beyond a limit, those that have not been used for longest are removed."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

#: For all features in a folder together.
MOST_BYTES = 20 * 10**9
# Whoever reads or writes meanwhile has done so today.
_SPARED_SECONDS = 24 * 3600.0
# A store; nothing else in the folder is ever touched.
_OURS = re.compile(r"[0-9a-f]{32}")


def note_use(store: Path) -> None:
    """Remember that a store's features have been asked for."""
    with contextlib.suppress(OSError):  # there is none yet, or it is another person's
        os.utime(store)


def make_room(folder: Path) -> None:
    """Remove stores from the least recently used on, until the rest is small enough or has been used today.

    Args:
        folder: of stores, each a folder by the name of 32 hexadecimal digits.
    """
    stores = sorted(_stores(folder))
    total = sum(size for _, size, _ in stores)
    for used, size, path in stores:
        if total <= MOST_BYTES or time.time() - used < _SPARED_SECONDS:
            return
        shutil.rmtree(path, ignore_errors=True)
        total -= size


def _stores(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each was last used, how large it is, and where."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            with contextlib.suppress(OSError):  # another process has just removed it, or a damaged file of it
                yield path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir()), path
