"""Locks between processes, on files; the system frees them when their holder ends, however it ends.

``filelock`` has no lock that several readers share, and it leaves its files behind. Needs ``flock``: Linux or macOS.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def waiting_lock(file: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Have a lock alone, after waiting for whoever has it. Its file is there while someone has it or waits.

    Args:
        file: of the lock.
        on_wait: called once if there is something to wait for.

    Raises:
        OSError: the file cannot be written, or its file system has no locks.
    """
    descriptor = _acquire(file, fcntl.LOCK_NB)
    if descriptor is None:
        if on_wait is not None:
            on_wait()
        descriptor = _acquire(file, 0)
    assert descriptor is not None
    with _removed_at_end(file, descriptor):
        yield


@contextmanager
def lock_if_free(file: Path) -> Iterator[bool]:
    """Have a lock alone, as :func:`waiting_lock`, if no one has it; gives whether it was free."""
    descriptor = _acquire(file, fcntl.LOCK_NB)
    if descriptor is None:
        yield False
    else:
        with _removed_at_end(file, descriptor):
            yield True


def _acquire(file: Path, non_blocking: int) -> int | None:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | non_blocking)
            if _is_file(descriptor, file):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed by whoever had the lock before


def _is_file(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _removed_at_end(file: Path, descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        try:
            file.unlink(missing_ok=True)  # while it is locked: no one else can have it by this name
        finally:
            os.close(descriptor)


def share(file: Path) -> int:
    """Share a lock file, which must exist, with other readers, and note the time as that of its last change.

    Returns:
        A descriptor; the lock is shared until it is closed, here and in processes forked from this one.

    Raises:
        OSError: there is no such file, or it cannot be written.
    """
    descriptor = os.open(file, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.utime(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def unshared(file: Path) -> Iterator[bool]:
    """Keep readers from sharing a lock file while the block runs; gives whether none of them had it.

    A file that is absent, or that this process may not change, counts as shared.
    """
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has it open, too
        os.close(descriptor)
