"""The ELPV benchmark: photographs of solar cells that glow under current, intact or defective."""

import importlib.util
from pathlib import Path

from datamodules.base import ImageDataModule
from datamodules.errors import DataError
from datamodules.storage import FileStorage, require_inside
from datamodules.table import Listing


class ElpvDataModule(ImageDataModule):
    """2,624 electroluminescence images of solar cells, 300x300 pixels, grey.

    Labels as in the paper: ``defective`` where the experts' defect probability is above 0.5, else ``functional``.
    The split is stratified by label and cell type (mono- or polycrystalline). The images come with the package
    ``elpv-dataset`` (CC BY-NC-SA 4.0) and are read where it is installed, unless ``root`` names another copy of its
    ``data`` folder.

    S. Deitsch et al., "Automatic classification of defective photovoltaic module cells in electroluminescence
    images", Solar Energy 185, 2019 (https://arxiv.org/abs/1807.02894).
    """

    @property
    def dataset_name(self) -> str:
        return "elpv"

    def find_images(self) -> Listing:
        root = Path(self.root).expanduser().resolve() if self.root is not None else _installed_data()
        listing = root / "labels.csv"
        if not listing.is_file():
            raise DataError(f"data.root: expected the ELPV file labels.csv in '{root}', found none.")
        paths, labels, strata = [], [], []
        for line in listing.read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            path, probability, cell_type = line.split()
            label = "defective" if float(probability) > 0.5 else "functional"
            paths.append(path)
            labels.append(label)
            strata.append(f"{label} {cell_type}")
        require_inside(root, paths, "data.root")
        return Listing(FileStorage(root, paths), paths, labels, [None] * len(paths), strata=strata)


def _installed_data() -> Path:
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "data: expected the installed package elpv-dataset, found none; pip install elpv-dataset, or "
            "install this project with its 'quickstart' extra."
        )
    return Path(spec.submodule_search_locations[0]) / "data"
