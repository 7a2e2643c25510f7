"""Which code made a run."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def code_revision() -> str:
    """The git commit of this project's checkout, ``-dirty`` with uncommitted changes; else its installed version."""
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return described.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass  # no git, or no checkout
    try:
        return version("transfer-pipeline")
    except PackageNotFoundError:
        return "unknown"
