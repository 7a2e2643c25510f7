"""``python -m pipeline sync``: sends what a tracking server missed, and ends runs whose process is gone."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.exits import SUCCESS
from pipeline.parsing import Parser
from pipeline.runs import note_tracked
from pipeline.tracking.journal import JOURNAL, Journal, RunBusyError, RunLock, last_entry, read_entries
from pipeline.tracking.replay import Replay, Sent
from pipeline.tracking.sender import Sender
from pipeline.tracking.store import prepare_store, require_store, where_to_look

_PATIENCE = 30.0  # seconds that a server which is away has to come back
_LAST_STEP = 3.0  # seconds that the end of a run waits for what is done beside it


def run_sync(arguments: Sequence[str]) -> int:
    """Send what the journals of run folders hold and their tracking stores do not; a second time does nothing.

    Args:
        arguments: of this command.

    Returns:
        The exit code.

    Raises:
        UserError: a folder has no journal, is still being trained, or its store does not answer.
    """
    parser = Parser("sync", "Send what the tracking server missed, and end runs whose process is gone.")
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="runs/<UTC time>-<id>")
    failures = []
    for folder in [Path(name) for name in parser.parse_args(arguments).folders]:
        try:
            _sync_folder(folder)
        except UserError as error:  # the others can be sent all the same
            failures.append(str(error))
    if failures:
        raise UserError("\n".join(failures))
    return SUCCESS


def _sync_folder(folder: Path) -> None:
    if not (folder / JOURNAL).is_file():
        raise UserError(f"sync: expected a run folder with a {JOURNAL}, found none in '{folder}'; name another one.")
    lock = RunLock(folder)
    try:
        lock.acquire()
    except RunBusyError as error:
        raise UserError(
            f"sync: expected a run that has ended in '{folder}', found that it is still being trained by process "
            f"{error.process}, which sends it itself; wait until that has ended."
        ) from error
    try:
        _sync(folder)
    finally:
        lock.release()


def _sync(folder: Path) -> None:
    tracking_uri = _end_dead(folder)
    if tracking_uri is None:
        print(f"{folder}: nothing was tracked")
        return
    require_store(tracking_uri)
    replay = Replay(folder, tracking_uri)
    waiting = replay.missing()
    sender = Sender(replay)
    sender.start()
    complete = sender.drain(_PATIENCE)
    sender.stop()
    if not complete:
        raise UserError(
            f"sync: expected '{replay.tracking_uri}' to take what is left of '{folder}' ({replay.missing():,} "
            f"operations), found that it does not ({sender.failure or 'no answer'}); try again when it is back."
        )
    run_id, experiment_id = replay.sent.run_id, replay.sent.experiment_id
    assert run_id is not None  # the journal begins with `begin`
    assert experiment_id is not None
    note_tracked(folder, run_id, experiment_id)
    print(f"{folder}: {f'{waiting:,} operations sent' if waiting else 'nothing was missing'}, run {run_id}")
    for line in (*missing_lines(replay, complete, sender.failure), *where_to_look(tracking_uri, experiment_id, run_id)):
        print(f"  {line.strip()}")


def missing_lines(replay: Replay, complete: bool, failure: str | None) -> Iterator[str]:
    """Lines that say what a store lacks of a journal; none where it has everything.

    Args:
        replay: of the journal.
        complete: whether everything was sent.
        failure: why not.
    """
    if not complete:
        yield (
            f"\nnot tracked   {replay.missing():,} operations wait in {replay.folder / JOURNAL}: {replay.tracking_uri} "
            f"does not take them ({failure or 'no answer'})"
        )
        yield f"to send them  python -m pipeline sync {replay.folder}"
    if replay.sent.refused:
        yield f"not taken     {len(replay.sent.refused):,} by the tracking store, the first: {replay.sent.refused[0]}"


def _end_dead(folder: Path) -> str | None:
    """End the journal of a run whose process is gone, and say where it is tracked; the lock must be held.

    Returns:
        The address of its store; None for an empty journal.

    Raises:
        UserError: its first line is damaged.
    """
    last = last_entry(folder)
    if last is None:
        return None
    first = next(read_entries(folder))
    if first.operation != "begin":
        raise UserError(
            f"expected '{folder / JOURNAL}' to begin with the run's name and address, found a damaged line; what is in "
            "it cannot be sent."
        )
    journal = Journal(folder)  # which cuts off a line that was torn
    if last.operation != "end":
        journal.append("end", {"key": first.content["key"], "status": "KILLED"}, at=last.time)
    journal.close()
    return first.content["tracking_uri"]


class Recovery:
    """Sends, beside a run, what earlier ones have left, and ends those whose process is gone.

    Each is tried once, and none at a store that has just failed: `sync` is there for the rest.

    Args:
        folder: of the run; the earlier ones lie beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="recovery", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Wait a little for what is under way, and begin nothing more."""
        self._stopping = True
        self._thread.join(_LAST_STEP)

    def _run(self) -> None:
        away: set[str] = set()
        for folder in sorted(file.parent for file in self.folder.parent.glob(f"*/{JOURNAL}")):
            if self._stopping:
                return
            lock = RunLock(folder)
            try:
                if folder.resolve() != self.folder.resolve() and not _is_complete(folder):
                    lock.acquire()
                    self._send(folder, away)
            except (RunBusyError, UserError, OSError, ValueError):
                continue  # it is being trained, belongs to somebody else or is damaged: none of this run's business
            finally:
                lock.release()

    def _send(self, folder: Path, away: set[str]) -> None:
        tracking_uri = _end_dead(folder)
        if tracking_uri is None or tracking_uri in away:
            return
        try:
            prepare_store(tracking_uri)
            replay = Replay(folder, tracking_uri)
            while not self._stopping and replay.step():
                pass
        except Exception:  # whatever a store raises: it stays for `sync`, which says why
            away.add(tracking_uri)


def _is_complete(folder: Path) -> bool:
    sent = Sent.read(folder)
    if sent.deferred or (folder / JOURNAL).stat().st_size > sent.position:
        return False
    last = last_entry(folder)
    return last is None or last.operation == "end"
