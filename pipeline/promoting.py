"""``python -m pipeline promote``."""

from collections.abc import Sequence


def run_promote(arguments: Sequence[str]) -> int:
    raise NotImplementedError
