"""The journal of a run: every tracked operation with its time, one line of JSON each, in the run folder.

Training only ever appends to it; what is in it reaches the tracking server later (see
:mod:`~pipeline.tracking.replay`), whatever the server does meanwhile.
"""

import fcntl
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"
_LOCK = "journal.lock"
_TAIL = 1 << 16  # bytes read at once when the last line is looked for


def now() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return time.time_ns() // 1_000_000


def plain(values: Mapping[str, float]) -> dict[str, float | str]:
    """Metrics for JSON, which knows no other numbers than finite ones: ``nan``, ``inf`` and ``-inf`` become words."""
    numbers = {name: float(value) for name, value in values.items()}
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}


@dataclass(frozen=True)
class Entry:
    """A line of the journal.

    Attributes:
        operation: such as ``metrics``; empty for a line that cannot be read.
        time: milliseconds since 1970.
        content: the rest of the line.
        end: position in the file behind the line, in bytes.
    """

    operation: str
    time: int
    content: dict[str, Any]
    end: int


class Journal:
    """Appends operations to the journal of a run folder; several threads may.

    Each line is written at once and not buffered: a process that is killed loses at most the line it was writing. Such
    a torn line is cut off when the journal is opened again.

    Args:
        folder: of the run; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: FileIO = open(folder / JOURNAL, "a+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._file.truncate(_end_of_last_line(self._file))
        self._appending = threading.Lock()

    def append(self, operation: str, content: Mapping[str, Any], at: int | None = None) -> None:
        """Write a line.

        Args:
            operation: its kind.
            content: for JSON.
            at: its time in milliseconds since 1970; None: now.
        """
        line = {"time": now() if at is None else at, "op": operation, **content}
        encoded = json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._appending:
            self._file.write(encoded)

    def close(self) -> None:
        """Write nothing more."""
        self._file.close()


def read_entries(folder: Path, position: int = 0) -> Iterator[Entry]:
    """The whole lines of a journal from a position on; a line that is still being written is left for later."""
    with open(folder / JOURNAL, "rb") as file:
        file.seek(position)
        for line in file:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            try:
                content = json.loads(line)
                yield Entry(content.pop("op"), content.pop("time"), content, position)
            except (ValueError, KeyError):  # the disk lost a part of it; what follows is whole again
                yield Entry("", 0, {"line": line[:80].decode(errors="replace")}, position)


def last_entry(folder: Path) -> Entry | None:
    """The last whole line; None where there is none."""
    with open(folder / JOURNAL, "rb") as file:
        end = _end_of_last_line(file)
        if end == 0:
            return None
        start = _end_of_last_line(file, end - 1)
    return next(read_entries(folder, start))


def _end_of_last_line(file: Any, before: int | None = None) -> int:
    """Position behind the last line break (before a position)."""
    end = file.seek(0, os.SEEK_END) if before is None else before
    while end > 0:
        start = max(end - _TAIL, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


class RunBusyError(Exception):
    """Another process has the journal of a run.

    Attributes:
        process: its number.
    """

    def __init__(self, process: str) -> None:
        super().__init__(f"the journal belongs to process {process}")
        self.process = process


class RunLock:
    """Held by the one process that writes or sends a run's journal.

    The system takes it from a process that ends in whatever way. A lock of the kind that forked children do not share:
    reading processes may outlive the training that started them for some seconds.

    Args:
        folder: of the run.
    """

    # Such locks do not keep a process from itself.
    _here: set[Path] = set()  # noqa: RUF012
    _looking = threading.Lock()

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._file: FileIO | None = None

    def acquire(self) -> None:
        """Take it.

        Raises:
            RunBusyError: another process, or another logger of this one, holds it.
        """
        with self._looking:
            if self.folder in self._here:
                raise RunBusyError(str(os.getpid()))
            file = open(self.folder / _LOCK, "a+b", buffering=0)  # noqa: SIM115 (closed by `release`)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                process = file.read().decode() or "another"
                file.close()
                raise RunBusyError(process) from None
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            self._file = file
            self._here.add(self.folder)

    def release(self) -> None:
        """Let others have it."""
        with self._looking:
            if self._file is not None:
                self._file.close()
                self._file = None
                self._here.discard(self.folder)
