"""How an image is prepared for a network: the one record and the one geometry of evaluation and serving.

Needs numpy and Pillow alone, because a registered model carries a copy of this file. Values are scaled and
normalised inside the model, from the same record.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its input; it belongs to the weights.

    Attributes:
        size: height and width of the input, in pixels.
        crop: share of the resized short side that the centre crop keeps, in (0, 1].
        interpolation: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``, all with antialiasing.
        mean: per channel, of values in [0, 1]; subtracted.
        std: per channel, of values in [0, 1]; divided by.
        channels: channels of the input.
    """

    size: int
    crop: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int

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
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain types: numbers, strings and lists."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def fit_to_size(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize the short side to ``size / crop`` and cut the centre ``size x size``.

        Args:
            image: RGB ``(height, width, 3)``, uint8.

        Returns:
            RGB ``(size, size, 3)``, uint8.
        """
        height, width = image.shape[:2]
        scale = round(self.size / self.crop) / min(height, width)
        # One resampling does both: the box below is the centre crop, in the coordinates of the source.
        side = min(self.size / scale, width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, min(left + side, width), min(top + side, height))
        resized = Image.fromarray(image).resize((self.size, self.size), _FILTERS[self.interpolation], box=box)
        return np.asarray(resized)
