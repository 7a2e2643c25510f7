"""The one exception type for mistakes that a person can mend."""

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """What was expected, what was found and what to do, in one line; printed without a traceback."""


def in_one_line(error: Exception) -> str:
    """The message; of an exception from a reading process, whose text holds its traceback, what it said at the end."""
    return re.sub(r"^(\w+\.)*\w*Error: ", "", str(error).strip().splitlines()[-1])


def near_matches(name: str, known: Iterable[str]) -> str:
    """A clause that names what the person may have meant.

    Example:
        >>> near_matches("resnet81", ["resnet18", "resnet34"])
        'did you mean resnet18 or resnet34? '
        >>> near_matches("xyz", ["resnet18"])
        ''
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}? " if close else ""
