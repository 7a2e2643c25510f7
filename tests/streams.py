"""Images for the tests of chunks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.storage import MemoryStorage
from datamodules.table import Listing

BEGINNINGS = (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"II*\x00", b"RIFF....WEBP", b"BM", b"")


def noise(count: int, seed: int = 0, largest: int = 60_000) -> MemoryStorage:
    """Noise that begins as images do; sizes differ."""
    rng = np.random.default_rng(seed)
    return MemoryStorage(
        [BEGINNINGS[row % 6] + rng.bytes(int(rng.integers(largest // 3, largest))) for row in range(count)]
    )


def pictures(count: int, seed: int = 0, largest: int = 60_000, **columns: Any) -> Listing:
    """Images sorted by class, all of them for training unless told otherwise."""
    columns = {"given": ["train"] * count, "labels": [f"class {4 * row // count}" for row in range(count)], **columns}
    return Listing(noise(count, seed, largest), [f"a/{row:04d}.jpg" for row in range(count)], **columns)


def contents(listing: Listing, row: int) -> bytes:
    source = listing.storage.source(row)
    return source if isinstance(source, bytes) else source.read_bytes()


def same_images(one: Listing, other: Listing) -> bool:
    """Whether two listings have the same images, in whichever order, with all that is known of them."""

    def facts(listing: Listing) -> dict[str, tuple[object, ...]]:
        columns = (listing.labels, listing.given, listing.groups, listing.weights, listing.strata)
        return {
            path: (contents(listing, row), *(None if column is None else column[row] for column in columns))
            for row, path in enumerate(listing.paths)
        }

    return facts(one) == facts(other) and one.separator == other.separator


def complaint(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message
