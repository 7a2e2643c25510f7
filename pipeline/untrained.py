"""Subcommands that train nothing themselves: where they start, and the settings that they read."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from pipeline.planning.plan import Plan
from pipeline.transfer_cli import TransferCLI


class UntrainedCLI(TransferCLI):
    """The settings of ``fit``, of which the data is made, and the network with its weights; nothing is trained."""

    #: Whether what is open in the settings is chosen.
    plans = False

    def make_plan(self) -> Plan:
        return super().make_plan() if self.plans else Plan(())

    def instantiate_trainer(self, **_: Any) -> Trainer:
        # Alone, also where a cluster would start others beside it.
        return Trainer(barebones=True, accelerator="cpu", plugins=[LightningEnvironment()])

    def fit(self, *_: Any, **__: Any) -> None:
        """Nothing: whoever made this object goes on with its parts."""


def run_untrained(arguments: Sequence[str], terminal: bool, started: float) -> int:
    """Run one of :data:`~pipeline.settings.UNTRAINED`.

    Args:
        arguments: its name and its arguments.
        terminal: whether a person is looking.
        started: ``time.perf_counter()`` when the program started.

    Returns:
        The exit code.

    Raises:
        UserError: an argument is wrong.
        DataError: the data is not as described.
    """
    name, others = arguments[0], arguments[1:]
    if name == "crossvalidate":
        from pipeline.crossvalidation import run_crossvalidate

        return run_crossvalidate(others)
    if name == "sync":
        from pipeline.tracking.sync import run_sync

        return run_sync(others)
    if name == "convert":
        from pipeline.converting import run_convert

        return run_convert(others, terminal, started)
    if name == "plan":
        from pipeline.plan_command import run_plan

        return run_plan(others, terminal, started)
    if name == "register":
        from pipeline.registering import run_register

        return run_register(others, terminal, started)
    if name == "promote":
        from pipeline.promoting import run_promote

        return run_promote(others)
    if name == "find":
        from pipeline.finding import run_find

        return run_find(others, terminal, started)
    from pipeline.auditing import run_audit

    return run_audit(others, terminal, started)
