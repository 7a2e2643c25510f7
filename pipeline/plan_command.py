"""``python -m pipeline plan``: every choice and why, before anything is trained."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.exits import SUCCESS
from pipeline.parsing import BESIDE_FIT, Parser
from pipeline.planning.duration import in_words
from pipeline.progress import say
from pipeline.untrained import UntrainedCLI


class PlanCLI(UntrainedCLI):
    """The settings of ``fit``, with everything chosen that is open."""

    plans = True
    alone = True


def run_plan(arguments: Sequence[str], terminal: bool, started: float) -> int:
    """Make the plan that ``fit`` would make with the same settings, show it, and keep it where that is asked.

    Args:
        arguments: of this command; those it does not know are settings of ``fit``.
        terminal: whether a person is looking.
        started: ``time.perf_counter()`` when the program started.

    Returns:
        The exit code.

    Raises:
        UserError: an argument is wrong, or the budget is too short.
        DataError: the data is not as described.
    """
    parser = Parser("plan", "Show every choice that fit would make, and why.", BESIDE_FIT)
    parser.add_argument("--to", metavar="FILE", help="write the choices as a configuration for fit")
    own, others = parser.parse_known_args(arguments)
    if own.to is not None and not Path(own.to).expanduser().resolve().parent.is_dir():
        raise UserError(f"--to: expected a file in an existing folder, found '{own.to}'; make the folder.")
    plan = PlanCLI(["fit", *others], terminal, started).plan
    if plan.seconds is not None:
        say(f"expected to take {in_words(plan.seconds)}")
    for line in plan.lines():
        say(line)
    if own.to is not None:
        file = Path(own.to).expanduser()
        file.write_text(plan.to_yaml(), encoding="utf-8")
        say(f"\nto train so   {shlex.join(['python', '-m', 'pipeline', 'fit', *others, '--config', str(file)])}")
    return SUCCESS
