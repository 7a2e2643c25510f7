"""The tables of ``benchmarks/transfer.py``: means with intervals, and ours against the best peer."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

#: What the defaults are held to: points ahead of the best peer's mean, points behind a case's best peer, its seconds.
AHEAD, BEHIND, SLOWER = 1.5, 0.5, 0.5
#: The largest share of the processors' time that others may take while seconds are counted.
DISTURBED = 0.05

OURS = "ours"

Result = dict[str, Any]


def is_ours(contestant: str) -> bool:
    """Ours is named by its command line: ``ours``, and what it was told."""
    return contestant.split()[0] == OURS


def computed_bf16(result: Result) -> bool:
    """Whether the processor did. Results that do not say it are from the time before there were others."""
    return bool(result.get("bf16", True))


class Ratio(NamedTuple):
    """Of seconds, in so many of all cases, on processors that compute bf16 or do not."""

    value: float
    timed: int
    cases: int
    bf16: bool

    def shown(self) -> str:
        if self.timed == 0:
            return "no seconds to compare"
        where = "" if self.timed == self.cases else f" in the {self.timed} of {self.cases} cases timed alike"
        return f"{self.value:.2f} of its seconds{where}{'' if self.bf16 else ', without bf16'}"


class Mean(NamedTuple):
    """A mean with half of its 95 % interval (not a number where there are fewer than two values)."""

    value: float
    half: float

    def points(self, sign: str = "") -> str:
        """In percentage points."""
        return Mean(100 * self.value, 100 * self.half).shown(1, sign)

    def shown(self, digits: int, sign: str = "") -> str:
        """As it is."""
        value = f"{self.value:{sign}.{digits}f}"
        return value if np.isnan(self.half) else f"{value} ± {self.half:.{digits}f}"


def mean_of(samples: Sequence[Sequence[float]]) -> Mean:
    """The mean of the samples' means, all weighing alike, with its t interval (of several: Welch and Satterthwaite's).

    Example:
        >>> mean_of([[0.7, 0.8, 0.9]]).points()
        '80.0 ± 24.8'
    """
    value = float(np.mean([np.mean(sample) for sample in samples]))
    if min(map(len, samples)) < 2:
        return Mean(value, np.nan)
    variances = np.array([np.var(sample, ddof=1) / len(sample) for sample in samples])
    if variances.sum() == 0:
        return Mean(value, 0.0)
    freedom = variances.sum() ** 2 / sum(variances**2 / [len(sample) - 1 for sample in samples])
    return Mean(value, float(stats.t.ppf(0.975, freedom) * np.sqrt(variances.sum()) / len(samples)))


def calibration_gaps(confidences: Sequence[float], right: Sequence[bool], bins: int = 15) -> list[float]:
    """Sums of confidence less correctness by bins of equal width, from which the error of several tests adds up.

    Args:
        confidences: probability of each answer.
        right: whether it was right.
        bins: their number.

    Returns:
        As many numbers, rounded to six decimals.
    """
    told, were = np.asarray(confidences), np.asarray(right, float)
    number = np.ceil(told * bins).clip(1).astype(int) - 1
    return [round(float(gap), 6) for gap in np.bincount(number, told - were, minlength=bins)]


def calibration_error(gaps: Sequence[Sequence[float]], images: int) -> float:
    """How far confidence is from accuracy (Guo et al. 2017, arXiv:1706.04599, equation 3), tests taken together.

    Args:
        gaps: :func:`calibration_gaps` of each test.
        images: of all tests.

    Example:
        >>> calibration_error([calibration_gaps([0.9, 0.9, 0.9, 0.9], [True, True, True, False])], 4)
        0.15
    """
    return round(float(np.abs(np.sum(gaps, axis=0)).sum() / images), 12)


class Standing:
    """Results by case, contestant and seed.

    Args:
        results: of ``benchmarks/transfer.py``.
        cases: names, in the order in which they are shown.
    """

    def __init__(self, results: Sequence[Result], cases: Sequence[str]) -> None:
        self._results: dict[tuple[str, str], dict[int, Result]] = {}
        for result in results:
            self._results.setdefault((result["case"], result["contestant"]), {})[result["seed"]] = result
        self.cases = [name for name in cases if any(case == name for case, _ in self._results)]
        self.contestants = sorted({contestant for _, contestant in self._results})
        # Seconds of processors that compute bf16 and of others, which take several times as long, have no common mean.
        self._bf16 = Counter(map(computed_bf16, results)).most_common(1)[0][0]

    def there(self, cases: Sequence[str]) -> list[str]:
        """Who has results of all these cases, best first."""
        there = [name for name in self.contestants if all((case, name) in self._results for case in cases)]
        return sorted(there, key=lambda name: -mean_of(self.samples(cases, name, "accuracy")).value)

    def best_peer(self, cases: Sequence[str]) -> str | None:
        """By mean accuracy."""
        return next((name for name in self.there(cases) if not is_ours(name)), None)

    def samples(self, cases: Sequence[str], contestant: str, value: str) -> list[list[float]]:
        """A value of each case by seed."""
        return [[result[value] for result in self._results[case, contestant].values()] for case in cases]

    def seconds(self, cases: Sequence[str], contestant: str, bf16: bool | None = None) -> float:
        """The mean of what was counted undisturbed; not a number where a case has no such result.

        Args:
            cases: their names.
            contestant: whose.
            bf16: on which processors; None: as most results are from.
        """
        bf16 = self._bf16 if bf16 is None else bf16
        counted = [
            [
                result["seconds"]
                for result in self._results[case, contestant].values()
                if result["others"] <= DISTURBED and computed_bf16(result) == bf16
            ]
            for case in cases
        ]
        return float(np.mean([np.mean(seconds) if seconds else np.nan for seconds in counted]))

    def ratio(self, cases: Sequence[str], one: str, other: str) -> "Ratio":
        """Seconds of one by those of the other, where both were timed on processors of a kind: as most results are
        from, if they were in any of these cases.
        """
        for bf16 in (self._bf16, not self._bf16):
            timed = [
                case
                for case in cases
                if not any(np.isnan(self.seconds([case], contestant, bf16)) for contestant in (one, other))
            ]
            if timed:
                value = self.seconds(timed, one, bf16) / self.seconds(timed, other, bf16)
                return Ratio(value, len(timed), len(cases), bf16)
        return Ratio(np.nan, 0, len(cases), self._bf16)

    def calibration_error(self, cases: Sequence[str], contestant: str) -> float:
        """ECE of the answers under all seeds taken together, the mean over cases."""
        errors = []
        for case in cases:
            results = self._results[case, contestant].values()
            images = sum(result["images"] for result in results)
            errors.append(calibration_error([result["gaps"] for result in results], images))
        return float(np.mean(errors))

    def differences(self, cases: Sequence[str], one: str, other: str, value: str) -> list[list[float]]:
        """By case: what a value of one is above the other's, for each seed that both have."""
        pairs = [(self._results[case, one], self._results[case, other]) for case in cases]
        return [[a[seed][value] - b[seed][value] for seed in a.keys() & b.keys()] for a, b in pairs]

    def comparisons(self, cases: Sequence[str]) -> Iterator[tuple[str, str, list[list[float]], "Ratio"]]:
        """Each of ours, the best peer, differences in accuracy by case and seed, and the ratio of seconds."""
        peer = self.best_peer(cases)
        for ours in filter(is_ours, self.there(cases)):
            if peer is None:
                continue
            differences = self.differences(cases, ours, peer, "accuracy")
            if all(differences):
                yield ours, peer, differences, self.ratio(cases, ours, peer)


def report(results: Sequence[Result], cases: Sequence[str]) -> str:
    """A table of each case and one of their mean; below each, ours against the best peer, and the targets.

    Args:
        results: of ``benchmarks/transfer.py``.
        cases: all there are, in the order in which they are shown.
    """
    standing = Standing(results, cases)
    parts = []
    for case in standing.cases:
        parts += [f"\n{case}\n", table(standing, [case]), *against_best(standing, [case])]
    parts += [f"\nmean over {len(standing.cases)} of {len(cases)} cases\n", table(standing, standing.cases)]
    parts += ["\naccuracy by case, %, and ours against each, paired by seed\n", overview(standing), ""]
    return "\n".join([*parts, *against_best(standing, standing.cases, AHEAD)])


def table(standing: Standing, cases: Sequence[str]) -> str:
    """Means with intervals over seeds of everybody who has results of all these cases."""
    there = standing.there(cases)
    width = max(map(len, there), default=0)
    lines = [
        f"| {'contestant':<{width}} | seeds | accuracy, % | macro-F1, % |        log loss |   ECE |   seconds |",
        f"|{'-' * (width + 2)}|------:|------------:|------------:|----------------:|------:|----------:|",
    ]
    for name in there:
        accuracy, macro_f1, log_loss = (
            mean_of(standing.samples(cases, name, value)) for value in ("accuracy", "macro_f1", "log_loss")
        )
        counts = sorted({len(sample) for sample in standing.samples(cases, name, "accuracy")})
        lines.append(
            f"| {name:<{width}} | {'-'.join(map(str, counts)):>5} | {accuracy.points():>11} | {macro_f1.points():>11} "
            f"| {log_loss.shown(3):>15} | {standing.calibration_error(cases, name):.3f} "
            f"| {shown_seconds(standing, cases, name, digits=1):>9} |"
        )
    return "\n".join(lines)


def overview(standing: Standing) -> str:
    """In Markdown: all who have results of every case, and how far ours is ahead of each, paired by seed.

    Percent of accuracy by case and in the mean; mean log loss, of which less is ahead; mean seconds.
    """
    cases = standing.cases
    lines = [
        f"| contestant | {' | '.join(cases)} | mean | ours ahead | log loss | ours ahead | seconds |",
        "|---|" + "---:|" * (len(cases) + 5),
    ]
    there = standing.there(cases)
    for name in there:
        samples = standing.samples(cases, name, "accuracy")
        cells = [mean_of(chosen).points() for chosen in (*([sample] for sample in samples), samples)]
        loss = mean_of(standing.samples(cases, name, "log_loss")).value
        more, less = "", ""
        if OURS in there and not is_ours(name):
            accuracies = standing.differences(cases, OURS, name, "accuracy")
            losses = standing.differences(cases, name, OURS, "log_loss")
            if all(accuracies):
                more, less = mean_of(accuracies).points("+"), mean_of(losses).shown(3, "+")
        lines.append(
            f"| {' | '.join([name, *cells, more, f'{loss:.3f}', less, shown_seconds(standing, cases, name)])} |"
        )
    return "\n".join(lines)


def shown_seconds(standing: Standing, cases: Sequence[str], contestant: str, digits: int = 0) -> str:
    """Mean seconds, or that none were counted."""
    seconds = standing.seconds(cases, contestant)
    return "none" if np.isnan(seconds) else f"{seconds:.{digits}f}"


def against_best(standing: Standing, cases: Sequence[str], target: float | None = None) -> list[str]:
    """Ours against the best peer of these cases, paired by seed, and whether that meets what is asked.

    It is asked of ours with nothing told; what was told a budget or anything else is only compared.

    Args:
        standing: the results.
        cases: which of them.
        target: points that the mean is to be ahead; None: the interval is not to lie below all of what is allowed,
            nor are the seconds to exceed their share.
    """
    lines = []
    for ours, peer, differences, ratio in standing.comparisons(cases):
        mean, counted = mean_of(differences), min(map(len, differences))
        ahead = f"{mean.points('+')} points of accuracy, n = {counted}"
        lines.append(f"{ours} against {peer}, paired by seed")
        if ours != OURS:
            lines += [f"  {ahead}", f"  {ratio.shown()}"]
        elif target is not None:
            lines += [f"  {verdict(100 * mean.value >= target)}  {ahead} (at least +{target})", f"  {ratio.shown()}"]
        else:  # with one seed there is no interval, and nothing is shown
            is_met = counted > 1 and 100 * (mean.value + mean.half) >= -BEHIND
            lines.append(f"  {verdict(is_met)}  {ahead} (not all below -{BEHIND})")
            lines.append(f"  {verdict(ratio.value <= SLOWER)}  {ratio.shown()} (at most {SLOWER})")
    return lines


def verdict(is_met: bool) -> str:
    return "met    " if is_met else "not met"
