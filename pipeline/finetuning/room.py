"""Room for kept features: beyond a limit, those that have not been used for longest are removed."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

#: How the names of files end in which features are kept, and until they are whole.
WHOLE, UNFINISHED = ".features", ".unfinished"
#: For all features in a folder together.
MOST_BYTES = 20 * 10**9
# A store that is being read or written was used within the last day.
_SPARED_SECONDS = 24 * 3600.0
# A store, in which nothing but such files lies; nothing else in the folder is ever touched.
_STORE = re.compile(r"[0-9a-f]{32}")


def note_use(store: Path) -> None:
    """Remember that a store's features have been asked for."""
    with contextlib.suppress(OSError):  # there is none yet, or it is another person's
        os.utime(store)


def make_room(folder: Path) -> None:
    """Remove stores from the least recently used on, until the rest is small enough or was used within the last day.

    Args:
        folder: of stores, each a folder by the name of 32 hexadecimal digits.
    """
    stores = sorted(_stores(folder))
    total = sum(size for _, size, _ in stores)
    for _, size, path in stores:
        if total <= MOST_BYTES:
            return
        with contextlib.suppress(OSError):  # another process has just removed it, or it is another person's
            if time.time() - path.stat().st_mtime >= _SPARED_SECONDS:  # looked up again: it may be in use since
                shutil.rmtree(path)
                total -= size


def _stores(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each was last used, how large it is, and where."""
    for path in folder.iterdir():
        if _STORE.fullmatch(path.name):
            with contextlib.suppress(OSError):  # it is no folder, or another process has just changed it
                files = list(path.iterdir())
                if all(file.suffix in (WHOLE, UNFINISHED) for file in files):
                    yield path.stat().st_mtime, sum(file.stat().st_size for file in files), path
