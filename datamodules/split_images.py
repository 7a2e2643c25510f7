"""The images of one split, by their place in it: what they are called and contain, and what the source says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.checking import usable_cores
from datamodules.contents import remembered_digests
from datamodules.storage import Storage


@dataclass(frozen=True)
class SplitImages:
    """Images of a split; a batch's ``index`` is a place among them.

    Args:
        storage: where the images of all splits lie.
        rows: of this split in the storage, int64 ``(N,)``, in order.
        all_paths: what every row of the storage is called.
        all_groups: what every row belongs to; None where nothing is known of it.
        all_metadata: what else the source says of every row, by name.

    Example:
        >>> from datamodules.storage import FileStorage
        >>> names = ["a.png", "b.png", "c.png"]
        >>> images = SplitImages(FileStorage(Path("folder"), names), np.array([0, 2]), names, ["p1", "p1", "p2"])
        >>> images.paths, images.groups, images.at([1]).paths
        (['a.png', 'c.png'], ['p1', 'p2'], ['c.png'])
    """

    storage: Storage
    rows: NDArray[np.int64]
    all_paths: Sequence[str]
    all_groups: Sequence[str] | None = None
    all_metadata: Mapping[str, Sequence[str]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def paths(self) -> list[str]:
        """What each is called; of files, relative to the storage's root."""
        return self._of_split(self.all_paths)

    @cached_property
    def groups(self) -> list[str] | None:
        """What each belongs to (a patient, a scene); None where nothing is known of it."""
        return None if self.all_groups is None else self._of_split(self.all_groups)

    @cached_property
    def metadata(self) -> dict[str, list[str]]:
        """What else the source says of each, by name."""
        return {name: self._of_split(values) for name, values in (self.all_metadata or {}).items()}

    def encoded(self, place: int) -> bytes:
        """The bytes of one image as they are stored."""
        source = self.storage.source(int(self.rows[place]))
        return source if isinstance(source, bytes) else source.read_bytes()

    def some(self, count: int) -> NDArray[np.int64]:
        """Places of a few images, spread over the split, int64, ``count`` at most.

        Where images lie in chunks they come from two of these at most, each of which has to be fetched whole.
        """
        blocks = self.storage.blocks
        places = np.arange(len(self))
        if blocks is not None:
            chunks = np.unique(blocks[self.rows])
            near = chunks[[len(chunks) // 4, 3 * len(chunks) // 4]]
            places = places[np.isin(blocks[self.rows], near)]
        return places[np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).astype(int))]

    def at(self, places: Any) -> "SplitImages":
        """Those at some places, or of a slice of them, in that order."""
        return replace(self, rows=self.rows[places])

    def contents(self, memo: Path) -> list[str]:
        """A digest of each encoded image; files that are as ``memo`` noted them are not read.

        Raises:
            DataError: the memo cannot be written.
        """
        return remembered_digests(self.storage, self.rows.tolist(), memo, usable_cores())

    def _of_split(self, values: Sequence[str]) -> list[str]:
        return [values[row] for row in self.rows]
