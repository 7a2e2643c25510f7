"""One promotion at a time, with nothing but the model registry that everybody shares.

Aliases cannot be set on condition, but of several processes that create a registered model of one name exactly one
succeeds, on SQLite, PostgreSQL and a tracking server alike.
"""

import os
import secrets
import socket
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from mlflow import MlflowClient

_POLL_SECONDS = 0.25
_GIVE_UP = 3  # times the stated time: another process has died while it took the lock over


class LockError(Exception):
    """The lock cannot be had, or is held no more; the text says why and what to do."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as the lock says.

    Attributes:
        token: of this one time.
        host: where it runs.
        pid: its process there.
        started: when it took the lock, in UTC.
        seconds: how long it may hold it.
    """

    token: str
    host: str
    pid: str
    started: str
    seconds: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.started}"

    @property
    def lives(self) -> bool | None:
        """Whether its process still runs; None where that cannot be told from here.

        The process holds a lock of the operating system, which ends with it; a process number may be given anew.
        """
        if self.host != socket.gethostname():
            return None
        try:
            with FileLock(_sign_of_life(self.token), timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # of another user
            return None


def _sign_of_life(token: str) -> Path:
    return Path(tempfile.gettempdir()) / f"transfer-pipeline-{token}.lock"


class PromotionLock:
    """Held inside a ``with`` block; in the registry it is the model ``<name>.promotion-lock``.

    A lock is taken over when it has been seen to be held by the same holder for the stated time, and its process is
    dead or, on another machine, cannot be asked; never from a process that is known to live. Who holds it must call
    :meth:`require_held` before each change, so that one that was stopped for longer than its time changes nothing.

    Args:
        client: of the registry.
        name: of the registered model that is locked.
        seconds: the stated time, above 0.

    Raises:
        LockError: on entering: a living process holds it all this time.
    """

    def __init__(self, client: "MlflowClient", name: str, seconds: float) -> None:
        self.client = client
        self.model = f"{name}.promotion-lock"
        self.seconds = seconds
        self.token = secrets.token_hex(8)
        self._file = FileLock(_sign_of_life(self.token))
        self._acquired = 0.0

    def __enter__(self) -> "PromotionLock":
        self._file.acquire()
        try:
            self._acquire()
        except BaseException:
            self._end_life()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            holder = self.holder()
            if holder is not None and holder.token == self.token:
                self.client.delete_registered_model(self.model)
        finally:
            self._end_life()

    def require_held(self) -> None:
        """Make sure that nobody else may think that the lock is free.

        Raises:
            LockError: half of the time is over, or another process has taken the lock.
        """
        holder = self.holder()
        held = time.monotonic() - self._acquired
        if holder is None or holder.token != self.token or held > self.seconds / 2:
            raise LockError(f"this process lost {self.model} after {held:.0f} s, and changed nothing more; try again.")

    def holder(self) -> Holder | None:
        """Who holds the lock; None: nobody that is known."""
        from mlflow.exceptions import RESOURCE_DOES_NOT_EXIST, ErrorCode, MlflowException

        try:
            tags = self.client.get_registered_model(self.model).tags
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return None
        if "token" not in tags:
            return None  # a store reads a model and its tags one after the other, and it was removed in between
        return Holder(tags["token"], tags["host"], tags["pid"], tags["started"], float(tags["seconds"]))

    def _acquire(self) -> None:
        seen, since = "", time.monotonic()
        while True:
            self._acquired = time.monotonic()
            if self._create(self.model):
                return
            holder = self.holder()
            token = "" if holder is None else holder.token
            if token == self.token:
                return  # the server had heard us the first time
            if token != seen:
                seen, since = token, time.monotonic()
            # By this process's own clock: those of others may go wrong.
            waited, stated = time.monotonic() - since, max(self.seconds, 0 if holder is None else holder.seconds)
            if waited >= _GIVE_UP * stated:
                raise LockError(
                    f"{self.model} is held by {holder or 'nobody that is known'}, and cannot be taken over; delete the "
                    f"registered models {self.model}* by hand."
                )
            if holder is not None and waited >= stated:
                if holder.lives:
                    raise LockError(f"{self.model} is held by {holder}, which still runs; wait for it, or end it.")
                self._free(holder)
            time.sleep(_POLL_SECONDS)

    def _free(self, dead: Holder) -> None:
        """Remove the lock of a dead holder, and of no other one.

        Several may find it dead at once. Only the one that makes the model named after the dead holder goes on, and it
        looks again: a slower one that comes when this is done finds another holder, or none.
        """
        claim = f"{self.model}.{dead.token}"
        if not self._create(claim):
            return
        try:
            holder = self.holder()
            if holder is not None and holder.token == dead.token:
                self.client.delete_registered_model(self.model)
        finally:
            self.client.delete_registered_model(claim)
        _sign_of_life(dead.token).unlink(missing_ok=True)

    def _create(self, model: str) -> bool:
        from mlflow.exceptions import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST, ErrorCode, MlflowException

        tags = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": str(os.getpid()),
            "started": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "seconds": f"{self.seconds:g}",
        }
        try:
            self.client.create_registered_model(model, tags, "Held while a promotion changes aliases.")
        except MlflowException as error:
            # The second: it was there, and gone when the store looked at it.
            if error.error_code in map(ErrorCode.Name, (RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST)):
                return False
            raise
        return True

    def _end_life(self) -> None:
        self._file.release()
        _sign_of_life(self.token).unlink(missing_ok=True)
