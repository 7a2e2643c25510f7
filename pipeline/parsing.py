"""The parser of subcommands that have arguments of their own."""

import argparse
from typing import NoReturn

from pipeline.errors import UserError


class Parser(argparse.ArgumentParser):
    """Arguments of ``python -m pipeline <name>``; a mistake raises ``UserError`` in place of ending the program."""

    def __init__(self, name: str, description: str, epilog: str | None = None) -> None:
        super().__init__(f"python -m pipeline {name}", description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help.")


#: For those beside whose own arguments the settings of ``fit`` may stand.
BESIDE_FIT = "Every setting of fit may stand beside these: --config FILE, --data.root FOLDER, ..."
