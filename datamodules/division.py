from collections import Counter
from dataclasses import dataclass

from datamodules.errors import DataError
from datamodules.splits import SPLITS, stratified_split
from datamodules.table import ImageTable, Listing


@dataclass(frozen=True)
class Division:
    val_fraction: float = 0.15
    test_fraction: float = 0.2
    seed: int = 0
    fold: str | None = None
    split_file: str | None = None

    def divide(self, listing: Listing) -> ImageTable:
        fractions = {"val": self.val_fraction, "test": self.test_fraction}
        labels, strata, given = listing.labels, listing.strata or listing.labels, [g or "train" for g in listing.given]
        root = listing.storage.location
        for split, fraction in fractions.items():
            if not 0 < fraction < 1:
                raise DataError(f"data.{split}_fraction: expected a share between 0 and 1, found {fraction}.")
        missing = [split for split in SPLITS if split not in given]
        train_share = 1 - sum(fractions[split] for split in missing)
        if train_share <= 0:
            raise DataError(
                f"data.val_fraction and data.test_fraction: expected a sum below 1, found {1 - train_share:g}; lower one."
            )
        splits = list(given)
        if missing:
            undivided = [row for row, split in enumerate(given) if split == "train"]
            for label, count in sorted(Counter(labels[row] for row in undivided).items()):
                if count <= len(missing):
                    raise DataError(
                        f"data.root: expected at least {len(missing) + 1} images of class '{label}' to divide among train, "
                        f"{' and '.join(missing)}, found {count} in {root}; add images or remove the class."
                    )
            shares = {"train": train_share} | {split: fractions[split] for split in missing}
            drawn = stratified_split([strata[row] for row in undivided], shares, self.seed)
            for row, split in zip(undivided, drawn, strict=True):
                splits[row] = str(split)
        return ImageTable(listing, splits, split_is_ours=bool(missing))
