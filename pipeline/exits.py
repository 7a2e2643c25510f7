"""Exit codes of the command line, ending on a signal, and ending at once."""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

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


def leave_with(main: Callable[[], int]) -> NoReturn:
    """Run a program and end its process with the code that it returns, or that it passes to ``sys.exit``.

    All that is done at the end of a process is done: threads are waited for, what was registered with ``atexit`` is
    called, the output is written. But the interpreter does not take the process apart object by object afterwards,
    which takes it two to three seconds where torch and Lightning have been imported.

    Raises:
        SystemExit: always, unless the program raises something else, which then ends the process as ever.
    """
    codes: list[int] = []

    def leave() -> None:
        if not codes:
            return
        logging.shutdown()  # which may have been registered before this, and would be called after it
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):  # nobody reads any more: the interpreter knows what to say
            return
        os._exit(codes[0])

    atexit.register(leave)  # called last, being the first
    try:
        codes.append(main())
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):  # a message is the interpreter's to print
            codes.append(error.code or SUCCESS)
        raise
    raise SystemExit(codes[0])
