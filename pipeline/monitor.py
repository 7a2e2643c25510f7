"""Which validation metric decides."""

from collections.abc import Mapping

from pipeline.errors import UserError

MONITORS = {"val/accuracy": "max", "val/macro_f1": "max", "val/loss": "min"}
#: The largest class must have this many times the images of the smallest for classes to count as uneven.
UNEVEN = 1.5


def choose_monitor(given: str, train_counts: Mapping[str, int]) -> tuple[str, str]:
    """The metric that picks the best checkpoint, and the reason.

    Where classes are uneven, accuracy rewards a model for neglecting the small ones; macro-F1 does not.

    Args:
        given: ``auto`` or a metric's name.
        train_counts: training images by class.

    Raises:
        UserError: an unknown metric.
    """
    if given != "auto":
        if given not in MONITORS:
            raise UserError(f"monitor: expected auto, {', '.join(MONITORS)}, found '{given}'; name one of these.")
        return given, "as set"
    ratio = max(train_counts.values()) / min(train_counts.values())
    if ratio >= UNEVEN:
        return "val/macro_f1", f"the largest class has {ratio:.1f} times the images of the smallest"
    return "val/accuracy", "classes are even"
