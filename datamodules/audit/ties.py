"""What hangs together, directly or by way of others."""

from collections.abc import Iterable, Sequence


def first_of_tied(count: int, ties: Iterable[Sequence[int]]) -> list[int]:
    """For each of ``count`` rows the first row that ties connect it with, directly or by way of others.

    Args:
        count: how many rows there are.
        ties: rows that belong together, any number of times.

    Example:
        >>> first_of_tied(6, [(1, 2), (4, 5), (2, 5)])
        [0, 1, 1, 3, 1, 1]
    """
    first = list(range(count))

    def root(row: int) -> int:
        while first[row] != row:
            first[row] = first[first[row]]
            row = first[row]
        return row

    for tie in ties:
        for row in tie[1:]:
            one, other = sorted((root(tie[0]), root(row)))
            first[other] = one
    return [root(row) for row in range(count)]
