"""The run that says what was promoted, what was not, and why."""

import contextlib
import getpass
import hashlib
import io
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.registry.rules import Comparison, Rules
from pipeline.registry.tested import Tested
from pipeline.registry.versions import Version

if TYPE_CHECKING:
    from mlflow import MlflowClient

#: The experiment with these runs.
EXPERIMENT = "promotions"
_LONGEST_TAG = 5000  # MLflow's own limit


class Audit:
    """A run in the experiment ``promotions``. It is begun before anything is changed: no change is without one.

    Args:
        client: of the store, which has the registry, too.
        name: of the registered model.
        action: what is tried.
    """

    def __init__(self, client: "MlflowClient", name: str, action: str) -> None:
        now = datetime.now(UTC)
        self.client = client
        self.report: dict[str, Any] = {
            "registered_model": name,
            "action": action,
            "who": _user(),
            "begun": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        }
        tags = {
            "mlflow.user": self.report["who"],
            "mlflow.source.name": "python -m pipeline promote",
            "mlflow.source.type": "LOCAL",
            "decision": "pending",
        }
        run = client.create_run(_experiment(client), run_name=f"{name}-{now:%Y%m%dT%H%M%SZ}", tags=tags)
        self.run_id: str = run.info.run_id

    def note_versions(self, challenger: Version, champion: Version | None, tests: list[Tested]) -> None:
        """Which versions are compared, by which test.

        Args:
            challenger: or what is to become the champion again.
            champion: at the time.
            tests: of the challenger, and of the champion if there is one; empty where there are none to be had.
        """
        for role, version in (("challenger", challenger), ("champion", champion)):
            self.report[role] = None if version is None else version.number
            self.report[f"{role}_run"] = None if version is None else version.run_id
            self.report[f"{role}_test_digest"] = None if version is None else version.proven_on
        self.report["test_images"] = len(tests[0].paths) if tests else None

    def note_rules(self, rules: Rules, comparison: Comparison | None) -> None:
        """The rules, and what they say."""
        text = yaml.safe_dump(rules.to_dict(), sort_keys=False)
        self.client.log_text(self.run_id, text, "rules.yaml")
        self.report["rules"] = rules.to_dict()
        self.report["rules_digest"] = hashlib.sha256(text.encode()).hexdigest()
        if comparison is None:
            return
        self.report["checks"] = [vars(check) for check in comparison.checks]
        self.report["differences"] = {name: found.to_dict() for name, found in comparison.differences.items()}
        self.report["ece"] = comparison.ece
        numbers = {"ece": comparison.ece}
        for name, found in comparison.differences.items():
            numbers |= {f"difference/{name}": found.value, **found.bounds(f"difference/{name}")}
        if comparison.mcnemar is not None:
            self.report["mcnemar"] = vars(comparison.mcnemar)
            numbers["mcnemar_p"] = comparison.mcnemar.p
        for name, value in numbers.items():
            self.client.log_metric(self.run_id, name, value)

    def close(self, decision: str, reason: str) -> None:
        """End the run.

        Args:
            decision: ``promoted``, ``rolled back``, ``refused`` or ``failed``.
            reason: why it was not done; empty where it was.
        """
        self.report |= {"decision": decision, "reason": reason, "decided": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        for name in ("registered_model", "action", "challenger", "champion", "who", "decided", "decision", "reason"):
            self.client.set_tag(self.run_id, name, str(self.report[name])[:_LONGEST_TAG])
        self.client.log_text(self.run_id, json.dumps(self.report, indent=2) + "\n", "promotion.json")
        with contextlib.redirect_stdout(io.StringIO()):  # where MLflow advertises the address of the run
            self.client.set_terminated(self.run_id, "FAILED" if decision == "failed" else "FINISHED")


def _experiment(client: "MlflowClient") -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return client.create_experiment(EXPERIMENT)
        except MlflowException:  # another promotion has just created it
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    return found.experiment_id


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # containers may run under a number without a name
        return "unknown"
