"""How an image is prepared for a network: the one record and the one geometry of evaluation and serving.

Needs numpy and Pillow alone, because a registered model carries a copy of this file. Values are scaled and
normalised inside the model, from the same record.
"""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
DTYPES = ("uint8", "uint16", "float32")

# How many times the size that is asked for an image must have where it was decoded at a reduced scale; from twice on,
# what follows comes out as if it had been decoded in full, but for rounding.
_ENOUGH = 2


class Picture(Protocol):
    """An image of known height and width whose pixels are still to be had, at a scale of at least ``share``."""

    height: int
    width: int

    def pixels(self, share: float = 1.0) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its input; it belongs to the weights.

    Attributes:
        size: height and width of the input, in pixels.
        crop: share of the resized short side that the centre crop keeps, in (0, 1].
        interpolation: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``, all with antialiasing.
        mean: per channel, of values in [0, 1] (of float32 images: as they are); subtracted.
        std: per channel, in the same unit; divided by.
        channels: channels of the input.
        dtype: of the input: ``uint8``, ``uint16`` (both scaled to [0, 1] by the network) or ``float32`` (not scaled).
    """

    size: int
    crop: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int
    dtype: str = "uint8"

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Preprocessing":
        """From plain types, as kept in checkpoints and bundles.

        Raises:
            ValueError: a value is out of its range.
        """
        made = cls(**{**record, "mean": tuple(record["mean"]), "std": tuple(record["std"])})
        if made.interpolation not in _FILTERS:
            raise ValueError(f"expected interpolation {', '.join(_FILTERS)}, found '{made.interpolation}'")
        if not 0 < made.crop <= 1:
            raise ValueError(f"expected crop in (0, 1], found {made.crop}")
        if made.size < 1:
            raise ValueError(f"expected size of at least 1 pixel, found {made.size}")
        if made.dtype not in DTYPES:
            raise ValueError(f"expected dtype {', '.join(DTYPES)}, found '{made.dtype}'")
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain types: numbers, strings and lists."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def prepare(self, picture: Picture) -> NDArray[Any]:
        """What evaluation and the served model see of an image: short side resized, centre cut out.

        Args:
            picture: of ``channels`` and ``dtype`` as here.

        Returns:
            ``(size, size, channels)`` of ``dtype``.
        """
        short = min(picture.height, picture.width)
        return self.fit_to_size(picture.pixels(min(1.0, _ENOUGH * self.short_side / short)))

    @property
    def short_side(self) -> int:
        """Short side in pixels to which images are resized before the centre is cut out."""
        return round(self.size / self.crop)

    def fit_to_size(self, image: NDArray[Any]) -> NDArray[Any]:
        """Resize the short side to ``size / crop`` and cut the centre ``size x size``.

        Args:
            image: ``(height, width, channels)`` of ``dtype``.

        Returns:
            ``(size, size, channels)`` of ``dtype``.
        """
        height, width = image.shape[:2]
        scale = self.short_side / min(height, width)
        # One resampling does both: the box below is the centre crop, in the coordinates of the source.
        side = min(self.size / scale, width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, min(left + side, width), min(top + side, height))
        if image.dtype == np.uint8 and image.shape[2] == 3:
            return np.asarray(self._resize(Image.fromarray(image), box))
        planes = [np.ascontiguousarray(image[..., channel]) for channel in range(image.shape[2])]
        if image.dtype == np.uint8:
            return np.stack([np.asarray(self._resize(Image.fromarray(plane), box)) for plane in planes], axis=-1)
        resized = np.stack(
            [np.asarray(self._resize(Image.fromarray(plane.astype(np.float32)), box)) for plane in planes], axis=-1
        )
        if image.dtype == np.uint16:
            return np.clip(np.rint(resized), 0, 65535).astype(np.uint16)
        return resized

    def _resize(self, image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        return image.resize((self.size, self.size), _FILTERS[self.interpolation], box=box)
