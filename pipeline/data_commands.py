"""Subcommands about data: where they start, and the settings that they read."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer

from pipeline.planning.plan import Plan
from pipeline.transfer_cli import TransferCLI


class DataCLI(TransferCLI):
    """The settings of ``fit``, of which the data is made, and the network with its weights; nothing is trained."""

    def instantiate_trainer(self, **_: Any) -> Trainer:
        return Trainer(barebones=True, accelerator="cpu")

    def make_plan(self) -> Plan:
        return Plan(())

    def fit(self, *_: Any, **__: Any) -> None:
        """Nothing: whoever made this object goes on with its parts."""


def run_data_command(arguments: Sequence[str], terminal: bool, started: float) -> int:
    """Run one of :data:`~pipeline.settings.DATA_COMMANDS`.

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
    if name == "convert":
        from pipeline.converting import run_convert

        return run_convert(others, terminal, started)
    from pipeline.auditing import run_audit

    return run_audit(others, terminal, started)
