"""Exit codes of the command line, and ending on a signal."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

#: All went well.
SUCCESS = 0
#: A failure of the program.
FAILURE = 1
#: A mistake that the person can mend.
USAGE = 2
#: A strict audit found unreadable images, or images in more than one split.
FOUND = 3
#: A challenger was not promoted.
REFUSED = 4
#: Interrupted by the person.
INTERRUPTED = 130
#: Ended by SIGTERM, as a cluster or a container is stopped.
TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: everything that an interruption by the person does, with an exit code of its own."""


@contextlib.contextmanager
def raising_terminated() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated` in the block, as Ctrl-C raises ``KeyboardInterrupt``."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere, signals cannot be handled
        yield
        return
    process = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked child, which has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
