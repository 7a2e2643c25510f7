"""When a challenger is good enough: rules from YAML, and what they say of two tests."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pipeline.errors import UserError, near_matches
from pipeline.evaluation.comparison import McNemar, expected_calibration_error, mcnemar, paired_differences, recalls
from pipeline.evaluation.metrics import METRICS, MULTI_LABEL_METRICS, Estimate
from pipeline.registry.tested import Tested

Floors = float | Mapping[str, float]


@dataclass(frozen=True)
class Rules:
    """What is asked of a challenger; a shipped file documents each (configs/promotion.yaml).

    Attributes:
        metric: that decides: accuracy, macro_f1, log_loss or, of several classes an image, mean_average_precision.
        confidence: of the interval of its difference, in (0, 1).
        min_difference: by which the challenger must be better at least.
        max_loss: by which it may be worse at the interval's lower bound.
        mcnemar_alpha: below which McNemar's p says that a challenger which loses more images (or groups of images)
            than it wins is worse.
        max_ece: largest expected calibration error; None: any.
        class_floors: least recall of each class, or of those that are named.
        slice_floors: least accuracy in every part of the test by a column of its metadata, or in those that are named.
        least_images: of a class or a part; with fewer it is not judged.
    """

    metric: str = "accuracy"
    confidence: float = 0.95
    min_difference: float = 0.0
    max_loss: float = 0.02
    mcnemar_alpha: float = 0.05
    max_ece: float | None = 0.15
    class_floors: Floors = field(default_factory=dict)
    slice_floors: Mapping[str, Floors] = field(default_factory=dict)
    least_images: int = 20

    @classmethod
    def from_yaml(cls, text: str, where: str) -> "Rules":
        """Read rules; what is not named keeps its default.

        Raises:
            UserError: a rule is unknown, or its value out of range; the message says where.
        """
        try:
            content = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: expected rules in YAML, found something else ({reason}).") from error
        known = [rule.name for rule in fields(cls)]
        if not isinstance(content, dict):
            raise UserError(
                f"{where}: expected rules by name, found {type(content).__name__}; see configs/promotion.yaml."
            )
        for name in content:
            if name not in known:
                raise UserError(
                    f"{where}: expected rules {', '.join(known)}, found '{name}'; {near_matches(str(name), known)}"
                    "remove or correct it."
                )
        floors = content.get("class_floors")
        if isinstance(floors, dict):  # classes may be called by numbers
            content["class_floors"] = {str(name): floor for name, floor in floors.items()}
        rules = cls(**content)
        for name, expected, fits in rules._demands():
            if not fits:
                raise UserError(f"{where}: {name}: expected {expected}, found {getattr(rules, name)!r}.")
        return rules

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)

    def _demands(self) -> Iterator[tuple[str, str, bool]]:
        yield (
            "metric",
            f"one of {', '.join(MULTI_LABEL_METRICS)}",
            isinstance(self.metric, str) and self.metric in MULTI_LABEL_METRICS,
        )
        yield "confidence", "a number between 0 and 1", _is_number(self.confidence) and 0 < self.confidence < 1
        yield "min_difference", "a number", _is_number(self.min_difference)
        yield "max_loss", "0 or more", _is_number(self.max_loss) and self.max_loss >= 0
        yield "mcnemar_alpha", "a number from 0 to 1", _is_share(self.mcnemar_alpha)
        yield "max_ece", "a number from 0 to 1, or null", self.max_ece is None or _is_share(self.max_ece)
        yield "class_floors", "a recall from 0 to 1, or one by class", _are_floors(self.class_floors)
        by_column = isinstance(self.slice_floors, Mapping) and all(map(_are_floors, self.slice_floors.values()))
        yield "slice_floors", "by column an accuracy from 0 to 1, or one by value", by_column
        whole = isinstance(self.least_images, int) and not isinstance(self.least_images, bool)
        yield "least_images", "a whole number above 0", whole and self.least_images > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _are_floors(value: Any) -> bool:
    return all(map(_is_share, value.values())) if isinstance(value, Mapping) else _is_share(value)


@dataclass(frozen=True)
class Check:
    """One rule applied.

    Attributes:
        rule: its name.
        passed: whether the challenger keeps it.
        found: in words.
    """

    rule: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Comparison:
    """What the rules say of a challenger.

    Attributes:
        checks: in order.
        differences: to the champion by metric, above 0 where the challenger is better; empty without a champion.
        mcnemar: against the champion; None without one.
        ece: expected calibration error of the challenger.
    """

    checks: list[Check]
    differences: dict[str, Estimate]
    mcnemar: McNemar | None
    ece: float


def compare(challenger: Tested, champion: Tested | None, rules: Rules) -> Comparison:
    """Apply the rules to two tests on the same images.

    Args:
        challenger: its test.
        champion: its test, or None where there is no champion yet; then floors and calibration are looked at alone.
        rules: to apply.

    Raises:
        UserError: a rule names a metric, class, column or value that the test does not have.
    """
    predictions = challenger.predictions
    known = MULTI_LABEL_METRICS if predictions.multi_label else METRICS
    if rules.metric not in known:
        raise UserError(f"metric: expected {', '.join(known)} for this model, found '{rules.metric}'.")
    checks: list[Check] = []
    differences: dict[str, Estimate] = {}
    tested = None
    if champion is not None:
        differences = paired_differences(predictions, champion.predictions, challenger.groups, rules.confidence)
        tested = mcnemar(predictions, champion.predictions, challenger.groups)
        units = "groups" if any(challenger.groups or []) else "images"
        checks += _against(differences[rules.metric], tested, units, rules)
    ece = expected_calibration_error(predictions)
    if rules.max_ece is not None:
        checks.append(Check("max_ece", ece <= rules.max_ece, f"{ece:.4f}, at most {rules.max_ece:g} allowed"))
    shares, counts = recalls(predictions)
    checks += _floors("class_floors", "recall", challenger.classes, shares, counts, rules.class_floors, rules)
    for column, floors in rules.slice_floors.items():
        if column not in challenger.metadata:
            raise UserError(
                f"slice_floors: expected a column of the test ({', '.join(challenger.metadata) or 'it has none'}), "
                f"found '{column}'."
            )
        names, part = np.unique(challenger.metadata[column], return_inverse=True)
        counts = np.bincount(part)
        shares = np.bincount(part, predictions.right) / counts
        checks += _floors(f"slice_floors.{column}", "accuracy", names.tolist(), shares, counts, floors, rules)
    return Comparison(checks, differences, tested, ece)


def _against(difference: Estimate, tested: McNemar, units: str, rules: Rules) -> list[Check]:
    share = f"{rules.confidence:.0%} interval {difference.low:+.4f} to {difference.high:+.4f}"
    worse = tested.lost > tested.won and tested.p < rules.mcnemar_alpha
    return [
        Check(
            "min_difference",
            difference.value >= rules.min_difference,
            f"{rules.metric} better by {difference.value:+.4f} ({share}, {difference.n:,} images), at least "
            f"{rules.min_difference:+g} asked for",
        ),
        Check(
            "max_loss",
            difference.low >= -rules.max_loss,
            f"at worst {difference.low:+.4f}, not below {-rules.max_loss:+g} allowed",
        ),
        Check(
            "mcnemar_alpha",
            not worse,
            f"{tested.won} {units} won, {tested.lost} lost, p = {tested.p:.3g}; lost with p below "
            f"{rules.mcnemar_alpha:g} is refused",
        ),
    ]


def _floors(
    rule: str,
    measure: str,
    names: Sequence[str],
    shares: NDArray[np.float64],
    counts: NDArray[np.int64],
    floors: Floors,
    rules: Rules,
) -> list[Check]:
    wanted = dict(floors) if isinstance(floors, Mapping) else dict.fromkeys(names, floors)
    for name in wanted:
        if name not in names:
            raise UserError(f"{rule}: expected {', '.join(names)}, found '{name}'; {near_matches(str(name), names)}")
    checks = []
    for name, share, count in zip(names, shares, counts, strict=True):
        if name not in wanted:
            continue
        found = f"{name}: {measure} {share:.4f} of {count:,} images, at least {wanted[name]:g} asked for"
        if count < rules.least_images:
            checks.append(Check(rule, True, f"{name}: {count:,} images, fewer than {rules.least_images}: not judged"))
        else:
            checks.append(Check(rule, bool(share >= wanted[name]), found))
    return checks
