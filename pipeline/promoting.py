"""``python -m pipeline promote``: the challenger becomes the champion, or is refused with the reason."""

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.exits import REFUSED, SUCCESS
from pipeline.parsing import Parser
from pipeline.progress import say
from pipeline.registry.promote import Decision, Promoter
from pipeline.registry.rules import Rules
from pipeline.settings import require_model_name


def run_promote(arguments: Sequence[str]) -> int:
    """Compare the challenger with the champion, and change places; or take the last change back.

    Args:
        arguments: of this command.

    Returns:
        The exit code: 0, or 4 where the challenger was refused.

    Raises:
        UserError: an argument or a rule is wrong, or there is nothing to promote.
    """
    parser = Parser("promote", "Make the challenger the champion if it is no worse by the rules, else exit with 4.")
    parser.add_argument("--name", required=True, help="of the registered model")
    parser.add_argument("--rules", metavar="FILE", help="in YAML; default: those of configs/promotion.yaml")
    parser.add_argument("--tracking_uri", help="of the registry; default: MLFLOW_TRACKING_URI, else mlflow.db here")
    parser.add_argument("--dry-run", action="store_true", help="compare, and change nothing")
    parser.add_argument("--rollback", action="store_true", help="make the previous champion the champion again")
    parser.add_argument(
        "--lock_timeout",
        type=float,
        default=60,
        metavar="SECONDS",
        help="after which the lock of a process that died is taken over; default: %(default)s",
    )
    own = parser.parse_args(arguments)
    require_model_name("--name", own.name)
    if not own.lock_timeout > 0:
        raise UserError(f"--lock_timeout: expected seconds above 0, found {own.lock_timeout:g}.")
    if own.rollback and own.rules is not None:
        raise UserError("--rollback: expected no --rules beside it, found some; a rollback compares nothing.")
    rules = _read_rules(own.rules)
    promoter = Promoter(own.name, own.tracking_uri, own.lock_timeout)
    decision = promoter.roll_back(own.dry_run) if own.rollback else promoter.promote(rules, own.dry_run)
    return _tell(own.name, decision, own.dry_run)


def _read_rules(file: str | None) -> Rules:
    if file is None:
        return Rules()
    try:
        return Rules.from_yaml(Path(file).expanduser().read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--rules: expected a file of text that can be read, found '{file}' ({error}); copy configs/promotion.yaml."
        ) from error


def _tell(name: str, decision: Decision, trial: bool) -> int:
    against = f"against version {decision.champion}" if decision.champion else "there is no champion yet"
    say(f"{name}: version {decision.challenger}, {against}")
    for check in decision.comparison.checks if decision.comparison else []:
        say(f"  {'kept  ' if check.passed else 'BROKEN'}  {check.rule:<14} {check.found}")
    if decision.audit_run is not None:
        say(f"written down in the run {decision.audit_run} of the experiment promotions")
    if decision.refusal is not None:
        print(f"refused: version {decision.challenger} is not promoted: {decision.refusal}.", file=sys.stderr)
        return REFUSED
    say(f"version {decision.challenger} {'would become' if trial else 'is now'} models:/{name}@champion")
    return SUCCESS
