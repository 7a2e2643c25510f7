"""Where the program keeps what it can make again."""

import os
from pathlib import Path


def cache_home(name: str) -> Path:
    """A folder among this person's caches: below ``XDG_CACHE_HOME`` where that is set, else below ``~/.cache``.

    Args:
        name: of what is kept there.
    """
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "transfer-pipeline" / name
