"""How images are prepared: what the weights ask for, what a person sets, and what only the data can tell."""

from collections.abc import Callable
from typing import Any, Literal

from datamodules.errors import DataError

Record = dict[str, Any]


def resolve_record(
    record: Record | None, image_size: int | Literal["auto"], crop_fraction: float | Literal["auto"]
) -> Record:
    """The record of the weights, with the size and the crop that a person may have set.

    Args:
        record: plain types of a :class:`~datamodules.preprocessing.Preprocessing`.
        image_size: in pixels, at least 32, or ``auto``.
        crop_fraction: in (0, 1], or ``auto``.

    Raises:
        DataError: there is no record, or a value is out of range.
    """
    if record is None:
        raise DataError(
            "data.preprocessing: expected the record that belongs to the model's weights, found none; "
            "pass pipeline.models.weights.preprocessing_record(backbone, weights)."
        )
    values = dict(record)
    if image_size != "auto":
        values["size"] = image_size
    if crop_fraction != "auto":
        values["crop"] = crop_fraction
    if values["size"] < 32:
        raise DataError(f"data.image_size: expected at least 32 pixels, found {values['size']}.")
    if not 0 < values["crop"] <= 1:
        raise DataError(f"data.crop_fraction: expected a share in (0, 1], found {values['crop']}.")
    return values


def measured_record(
    record: Record,
    channels: int,
    dtype: str,
    measure: Callable[[Record], tuple[list[float], list[float]]],
) -> Record:
    """The record for images of another kind than the weights know, with their own mean and standard deviation.

    Args:
        record: of the weights; size, crop and interpolation stay.
        channels: of the images.
        dtype: of the images.
        measure: gives mean and standard deviation of each channel of the training images read by a record.

    Raises:
        DataError: none of them is of this kind.
    """
    blank = {**record, "channels": channels, "dtype": dtype, "mean": [0.0] * channels, "std": [1.0] * channels}
    try:
        mean, std = measure(blank)
    except OSError as error:
        raise DataError(
            f"data.channels and data.dtype: expected images with {channels} channels of {dtype}, found none among the "
            f"training images ({error}); set them to what the images have."
        ) from error
    return {**blank, "mean": mean, "std": std}
