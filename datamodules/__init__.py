"""LightningDataModules for labelled images. Imports nothing from ``pipeline``."""

from datamodules.base import ImageDataModule
from datamodules.elpv import ElpvDataModule
from datamodules.errors import DataError
from datamodules.image_folder import ImageFolderDataModule
from datamodules.sources import HuggingFaceDataModule, ManifestDataModule, StreamingDataModule

__all__ = [
    "DataError",
    "ElpvDataModule",
    "HuggingFaceDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ManifestDataModule",
    "StreamingDataModule",
]
