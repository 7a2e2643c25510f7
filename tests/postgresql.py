"""A PostgreSQL of its own for a test, where its programs are installed."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Whom it runs as where the tests run as the superuser, as whom it refuses to.
_NOBODY = "nobody"


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """The address of an empty database that is there as long as the block; the test is skipped where there is none."""
    programs = [shutil.which(name) for name in ("initdb", "pg_ctl")]
    if not all(programs) or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs PostgreSQL's initdb and pg_ctl, and the package psycopg2")
    initdb, control = map(str, programs)
    superuser = os.geteuid() == 0
    # Not below a folder of the superuser's own, which nobody else may enter. (Names of sockets must be short, too.)
    place = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp" if superuser else None))
    if superuser:
        shutil.chown(place, _NOBODY)

    def run(*command: str | Path) -> None:
        becomes = _NOBODY if superuser else None
        environment = {**os.environ, "HOME": str(place)}
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, cwd=place, env=environment, user=becomes, timeout=120
        )

    data = place / "data"
    run(initdb, "-D", data, "-U", "tracking", "-A", "trust", "--no-sync")
    options = f"-c listen_addresses= -c unix_socket_directories={place}"
    run(control, "-D", data, "-w", "-l", place / "log", "-o", options, "start")
    try:
        yield f"postgresql+psycopg2://tracking@/postgres?host={place}"
    finally:
        run(control, "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(place)
