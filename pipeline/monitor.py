"""Which validation metric decides."""

from collections.abc import Mapping

from pipeline.errors import UserError, near_matches

#: Validation metrics, and which end is best.
MONITORS = {"val/accuracy": "max", "val/macro_f1": "max", "val/loss": "min", "val/mean_average_precision": "max"}
_OF_SEVERAL_CLASSES = "val/mean_average_precision"
#: The largest class must have this many times the images of the smallest for classes to count as uneven.
UNEVEN = 1.5


def choose_monitor(given: str, train_counts: Mapping[str, int], multi_label: bool) -> tuple[str, str]:
    """The metric that picks the best checkpoint, and the reason.

    Where classes are uneven, accuracy rewards a model for neglecting the small ones; macro-F1 does not. Where an image
    may have several classes, accuracy asks for all of them at once and tells little; the average precision, which looks
    at ranks alone, is perfect long before the labels are.

    Args:
        given: ``auto`` or a metric's name.
        train_counts: training images by class.
        multi_label: whether an image may have several classes.

    Raises:
        UserError: an unknown metric, or one for several classes an image where each has one.
    """
    if given != "auto":
        known = [name for name in MONITORS if multi_label or name != _OF_SEVERAL_CLASSES]
        if given not in known:
            raise UserError(
                f"monitor: expected auto, {', '.join(known)}, found '{given}'; {near_matches(given, known)}name one of "
                "these."
            )
        return given, "as set"
    if multi_label:
        return "val/macro_f1", "an image may have several classes"
    ratio = max(train_counts.values()) / min(train_counts.values())
    if ratio >= UNEVEN:
        return "val/macro_f1", f"the largest class has {ratio:.1f} times the images of the smallest"
    return "val/accuracy", "classes are even"
