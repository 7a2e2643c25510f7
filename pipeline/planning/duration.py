"""A length of time as people write it."""

import re

from pipeline.errors import UserError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)([smh])")


def seconds_of(text: str) -> float:
    """Seconds in ``90s``, ``5m``, ``1.5h`` or ``1h30m``.

    Raises:
        UserError: it is written otherwise, or no time at all.

    Example:
        >>> seconds_of("5m"), seconds_of("1h30m")
        (300.0, 5400.0)
    """
    parts = _PART.findall(text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise UserError(f"--budget: expected a time such as 90s, 5m or 1h30m, found '{text}'.")
    return seconds


def in_words(seconds: float) -> str:
    """A length of time in two figures or so.

    Example:
        >>> in_words(42.3), in_words(317)
        ('42 s', '5.3 min')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
