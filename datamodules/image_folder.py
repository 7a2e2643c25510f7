"""Images in class folders."""

from pathlib import Path

from datamodules.base import ImageDataModule
from datamodules.errors import DataError
from datamodules.splits import SPLITS
from datamodules.storage import FileStorage, require_inside
from datamodules.table import Listing, list_images

# Names under which people keep their images, in any case.
_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class ImageFolderDataModule(ImageDataModule):
    """``root/<class>/...`` or ``root/{train,val,test}/<class>/...``, images at any depth below the class.

    Undivided images are divided, stratified by class and seeded. Of divided ones, a missing ``val`` or
    ``test`` is taken out of ``train`` in the same way.
    """

    def find_images(self) -> Listing:
        if self.root is None:
            raise DataError("data.root: expected a folder of class folders, found none; give --data.root <folder>.")
        root = Path(self.root).expanduser().resolve()
        if not root.is_dir():
            raise DataError(f"data.root: expected a folder of class folders, found nothing at '{self.root}'.")
        folders = _split_folders(root)
        paths: list[str] = []
        labels: list[str] = []
        given: list[str | None] = []
        divided = any(folder is not None for split, folder in folders.items() if split != "train")
        for split in SPLITS:
            for label, found in _images_by_class(folders[split], root):
                paths += found
                labels += [label] * len(found)
                given += [split if divided else None] * len(found)
        require_inside(root, paths, "data.root")
        return Listing(FileStorage(root, paths), paths, labels, given)


def _split_folders(root: Path) -> dict[str, Path | None]:
    present = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    folders = {
        split: next((present[name] for name in names if name in present), None) for split, names in _FOLDERS.items()
    }
    if folders["train"] is not None:
        return folders
    others = [str(folder.name) for folder in folders.values() if folder is not None]
    if others:
        raise DataError(
            f"data.root: expected a folder 'train' beside '{' and '.join(others)}' in '{root}', found none; name the "
            "folder of training images 'train'."
        )
    return {"train": root, "val": None, "test": None}


def _images_by_class(folder: Path | None, root: Path) -> list[tuple[str, list[str]]]:
    if folder is None:
        return []
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise DataError(f"data.root: expected a folder for each class in '{folder}', found none.")
    found = [(path.name, list_images(path, root)) for path in classes]
    for name, images in found:
        if not images:
            raise DataError(
                f"data.root: expected images of class '{name}', found none in '{folder / name}'; "
                "add images or remove the folder."
            )
    return found
