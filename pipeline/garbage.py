"""Python's search for garbage in cycles, kept away from where there is none."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collecting_nothing() -> Iterator[None]:
    """While much is made that stays: libraries are imported a tenth sooner.

    Example:
        >>> with collecting_nothing():
        ...     import decimal
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
