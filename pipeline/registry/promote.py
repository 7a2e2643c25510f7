"""From challenger to champion, and back: by rules, under a lock, and with a run that says why."""

from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.errors import UserError
from pipeline.registry.audit import Audit
from pipeline.registry.lock import LockError, PromotionLock
from pipeline.registry.rules import Comparison, Rules, compare
from pipeline.registry.tested import Tested
from pipeline.registry.versions import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    ROLLED_BACK,
    IncomparableError,
    Version,
    aliases,
    fetch_tested,
    read_version,
)
from pipeline.tracking.store import asking, require_there, resolve_tracking_uri, speaking


@dataclass(frozen=True)
class Decision:
    """What became of a promotion.

    Attributes:
        challenger: version that was looked at; of a rollback, the one that comes back.
        champion: version that it was compared with, or that is taken back; None: there was none.
        comparison: by the rules; None where it did not come to one.
        refusal: why nothing was changed; None: it was, or would have been.
        audit_run: id of the run that says so; None for a trial.
    """

    challenger: int
    champion: int | None
    comparison: Comparison | None
    refusal: str | None
    audit_run: str | None = None


class Promoter:
    """Changes which version of a registered model is the champion.

    Args:
        name: of the registered model.
        tracking_uri: of the registry; None: where runs are tracked.
        lock_seconds: after which the lock of a dead process is taken over, above 0.

    Raises:
        UserError: there is no such model.
    """

    def __init__(self, name: str, tracking_uri: str | None, lock_seconds: float) -> None:
        from mlflow import MlflowClient

        self.name = name
        self.uri = resolve_tracking_uri(tracking_uri)
        require_there(self.uri)
        self.client = MlflowClient(self.uri, self.uri)
        self.lock_seconds = lock_seconds
        with asking(self.uri):
            aliases(self.client, name)

    def promote(self, rules: Rules, trial: bool = False) -> Decision:
        """Make the challenger the champion, if it is no worse by the rules.

        Args:
            rules: to compare by.
            trial: whether nothing is to be changed or written.

        Raises:
            UserError: there is no challenger, or a rule does not fit its test.
        """
        found = aliases(self.client, self.name)
        if CHALLENGER not in found:
            raise UserError(
                f"--name: expected a version with the alias {CHALLENGER}, found none of '{self.name}'; register one "
                "with `python -m pipeline register`."
            )
        challenger = read_version(self.client, self.name, found[CHALLENGER])
        champion = read_version(self.client, self.name, found[CHAMPION]) if CHAMPION in found else None
        comparison, tests = None, []
        refusal = _why_stale(challenger, champion)
        if refusal is None:
            try:
                tests = self._comparable(challenger, champion)
                comparison = compare(tests[0], tests[1] if champion else None, rules)
                refusal = _why_not(comparison)
            except IncomparableError as error:
                refusal = f"it cannot be compared: {error}"
        decision = Decision(challenger.number, champion.number if champion else None, comparison, refusal)
        if trial:
            return decision
        audit = Audit(self.client, self.name, "promote")
        audit.note_versions(challenger, champion, tests)
        audit.note_rules(rules, comparison)
        return self._carry_out(decision, audit)

    def roll_back(self, trial: bool = False) -> Decision:
        """Make the previous champion the champion again; the one that is taken back is not promoted any more.

        Args:
            trial: whether nothing is to be changed or written.

        Raises:
            UserError: there is no champion, or none before it.
        """
        found = aliases(self.client, self.name)
        if CHAMPION not in found or PREVIOUS not in found or found[CHAMPION] == found[PREVIOUS]:
            raise UserError(
                f"--rollback: expected '{self.name}' to have a {CHAMPION} and another {PREVIOUS}, found the aliases "
                f"{', '.join(f'{alias} ({number})' for alias, number in sorted(found.items())) or 'none'}."
            )
        decision = Decision(found[PREVIOUS], found[CHAMPION], None, None)
        if trial:
            return decision
        audit = Audit(self.client, self.name, "roll back")
        previous, champion = (read_version(self.client, self.name, found[alias]) for alias in (PREVIOUS, CHAMPION))
        audit.note_versions(previous, champion, [])
        return self._carry_out(decision, audit, back=True)

    def _comparable(self, challenger: Version, champion: Version | None) -> list[Tested]:
        """The tests of both, which are the same one."""
        tests = [fetch_tested(self.name, version, self.uri) for version in (challenger, champion) if version]
        if champion is not None:
            one, other = tests
            if one.classes != other.classes or one.predictions.multi_label != other.predictions.multi_label:
                raise IncomparableError(
                    f"its classes are {', '.join(one.classes)}, the champion's {', '.join(other.classes)}"
                )
            if one.digest != other.digest:
                raise IncomparableError(
                    f"it was tested on other images ({len(one.paths):,}, digest {one.digest[:12]}) than the champion "
                    f"({len(other.paths):,}, digest {other.digest[:12]}); train it on the champion's split.csv"
                )
        return tests

    def _carry_out(self, decision: Decision, audit: Audit, back: bool = False) -> Decision:
        """Change the aliases, unless the decision is a refusal, and write down how it went."""
        refusal = decision.refusal
        try:
            if refusal is None:
                refusal = self._change(decision, back)
        except BaseException as error:
            audit.close("failed", f"{type(error).__name__}: {error}")
            raise
        audit.close("refused" if refusal else "rolled back" if back else "promoted", refusal or "")
        return Decision(decision.challenger, decision.champion, decision.comparison, refusal, audit.run_id)

    def _change(self, decision: Decision, back: bool) -> str | None:
        """Set the aliases under the lock; why not, where that is so."""
        client, name = self.client, self.name
        # A write that MLflow goes on trying could arrive when another process has the lock.
        at_once = speaking(max(1, round(self.lock_seconds / 4)), retries=0)
        try:
            with at_once, PromotionLock(client, name, self.lock_seconds) as lock:
                now = aliases(client, name)
                if now.get(CHAMPION) != decision.champion:
                    return (
                        f"the champion has become version {now.get(CHAMPION)} meanwhile, and version "
                        f"{decision.challenger} was compared with {_in_words(decision.champion)}; promote again"
                    )
                came_from = PREVIOUS if back else CHALLENGER
                if now.get(came_from) != decision.challenger:
                    return f"the alias {came_from} was moved to version {now.get(came_from)} meanwhile; try again"
                if back:
                    lock.require_held()
                    at = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
                    client.set_model_version_tag(name, str(decision.champion), ROLLED_BACK, at)
                elif decision.champion is not None:
                    lock.require_held()
                    client.set_registered_model_alias(name, PREVIOUS, str(decision.champion))
                lock.require_held()
                client.set_registered_model_alias(name, CHAMPION, str(decision.challenger))
                if back:
                    client.delete_registered_model_alias(name, PREVIOUS)
                self._read_back(decision, back)
                lock.require_held()
        except LockError as error:
            return str(error)
        return None

    def _read_back(self, decision: Decision, back: bool) -> None:
        now = aliases(self.client, self.name)
        expected = (decision.challenger, None if back else decision.champion)
        # A first promotion leaves a previous champion as it finds it.
        previous = now.get(PREVIOUS) if back or decision.champion is not None else None
        if (now.get(CHAMPION), previous) != expected:
            raise RuntimeError(
                f"The registry does not say what was written: expected champion and previous champion {expected}, "
                f"found {(now.get(CHAMPION), previous)}."
            )


def _why_stale(challenger: Version, champion: Version | None) -> str | None:
    if challenger.rolled_back is not None:
        return f"it was rolled back at {challenger.rolled_back}; register another"
    if champion is None or challenger.number > champion.number:
        return None
    if challenger.number == champion.number:
        return "it is stale: it is the champion already"
    return f"it is stale: the champion, version {champion.number}, was registered after it"


def _why_not(comparison: Comparison) -> str | None:
    failed = [f"{check.rule}: {check.found}" for check in comparison.checks if not check.passed]
    return "; ".join(failed) or None


def _in_words(version: int | None) -> str:
    return "no champion" if version is None else f"version {version}"
