"""LightningDataModules for labelled images. Imports nothing from ``pipeline``."""

from datamodules.base import ImageDataModule
from datamodules.elpv import ElpvDataModule
from datamodules.errors import DataError
from datamodules.image_folder import ImageFolderDataModule

__all__ = ["DataError", "ElpvDataModule", "ImageDataModule", "ImageFolderDataModule"]
