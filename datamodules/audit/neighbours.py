"""The nearest rows of one matrix to the rows of another, by cosine: exactly, or in cells where there are many."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

#: Up to this many queries every pair is compared.
MOST_COMPARED = 10_000
#: Cells that are searched for each query, beyond that.
PROBES = 16
_BLOCK = 1024


def nearest(queries: Floats, rows: Floats, count: int, seed: int = 0) -> tuple[NDArray[np.int64], Floats]:
    """For each query the rows most like it.

    With more than 10,000 queries the rows are dealt to the nearest of about ``sqrt(len(rows))`` of them, picked at
    random, and each query is compared with those in the 16 nearest cells (an inverted file: J. Sivic and A. Zisserman,
    "Video Google", ICCV 2003), so that time grows with the power 1.5 of their number.

    Args:
        queries: of length 1 each, ``(Q, F)``.
        rows: likewise, ``(R, F)``.
        count: how many rows for a query.
        seed: of the choice of cells.

    Returns:
        Row numbers ``(Q, count)``, best first, -1 where there are no more; and their cosines, -1 where there are none.
    """
    count = min(count, len(rows))
    if len(queries) <= MOST_COMPARED:
        found = [_best(block @ rows.T, np.arange(len(rows)), count) for block in _blocks(queries)]
        return np.concatenate([index for index, _ in found]), np.concatenate([cosine for _, cosine in found])
    return _nearest_in_cells(queries, rows, count, seed)


def _blocks(rows: Floats) -> list[Floats]:
    return [rows[start : start + _BLOCK] for start in range(0, max(len(rows), 1), _BLOCK)]


def _best(cosines: Floats, numbers: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], Floats]:
    """The ``count`` largest of each line, in order; ``numbers`` are the columns' names."""
    if cosines.shape[1] > count:
        columns = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
    else:
        columns = np.tile(np.arange(cosines.shape[1]), (len(cosines), 1))
    values = np.take_along_axis(cosines, columns, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return numbers[np.take_along_axis(columns, order, 1)], np.take_along_axis(values, order, 1)


def _nearest_in_cells(queries: Floats, rows: Floats, count: int, seed: int) -> tuple[NDArray[np.int64], Floats]:
    rng = np.random.default_rng(seed)
    centres = rows[rng.choice(len(rows), int(np.sqrt(len(rows))), replace=False)]
    cell = np.concatenate([(block @ centres.T).argmax(1) for block in _blocks(rows)])
    probed = np.concatenate(
        [_best(block @ centres.T, np.arange(len(centres)), PROBES)[0] for block in _blocks(queries)]
    )
    members = _by_value(cell, len(centres))
    asking = _by_value(probed.ravel(), len(centres))
    index = np.full((len(queries), count), -1, np.int64)
    cosine = np.full((len(queries), count), -1, np.float32)
    for here, visits in zip(members, asking, strict=True):
        if not len(here):
            continue
        who = visits // probed.shape[1]
        new_index, new_cosine = _best(queries[who] @ rows[here].T, here, count)
        both_index = np.concatenate([index[who], new_index], 1)
        both_cosine = np.concatenate([cosine[who], new_cosine], 1)
        order = np.argsort(-both_cosine, axis=1, kind="stable")[:, :count]
        index[who] = np.take_along_axis(both_index, order, 1)
        cosine[who] = np.take_along_axis(both_cosine, order, 1)
    return index, cosine


def _by_value(values: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """Where each of the values 0 to ``count - 1`` stands."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.searchsorted(values[order], np.arange(1, count)))
