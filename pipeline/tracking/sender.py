"""The thread that sends a journal while training goes on."""

import threading
import time

from pipeline.tracking.replay import Replay

_PAUSE = 1.0  # seconds between looks at a journal of which everything was sent
_FIRST_RETRY, _LAST_RETRY = 0.5, 10.0
# How long the end of a run waits, in seconds: without an answer, after one that says no, and for an upload.
_SILENCE, _FAILING = 10.0, 3.0
_SLOWEST_UPLOAD = 2_000_000  # bytes a second
_LONGEST_UPLOAD = 60.0


class Sender:
    """Sends a journal in the background, and waits ever longer between attempts where the store is away.

    Args:
        replay: of the journal.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        #: Why the last attempt failed; None where it did not.
        self.failure: str | None = None
        self._moved = time.monotonic()
        self._uploading = 0.0
        self._wake = threading.Event()
        self._stopping = False
        self._stepping = threading.Lock()
        # Not waited for when the program ends: it may be stuck in a request, and what it leaves is sent by `sync`.
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Send nothing more after the request that is under way."""
        self._stopping = True
        self._wake.set()

    def wake(self) -> None:
        """Look at the journal now."""
        self._wake.set()

    def drain(self, failing: float = _FAILING) -> bool:
        """Wait until everything was sent, or until nothing moves any more.

        Args:
            failing: seconds without any progress after which a store that is known to fail is given up.

        Returns:
            Whether the store has everything.
        """
        self._moved = time.monotonic()
        self.wake()
        while not self.replay.done:
            patience = max(_SILENCE, self._uploading) if self.failure is None else failing
            if time.monotonic() - self._moved > patience:
                return False
            time.sleep(0.02)
        with self._stepping:  # until it has noted that it is done
            return True

    def _run(self) -> None:
        retry = _FIRST_RETRY
        while not self._stopping:
            self._wake.clear()
            try:
                self._uploading = min(self.replay.upload() / _SLOWEST_UPLOAD, _LONGEST_UPLOAD)
                with self._stepping:
                    sent = self.replay.step()
            except Exception as error:  # stores and their artifacts raise whatever they like; it is told at the end
                self.failure = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._wake.wait(retry)
                retry = min(2 * retry, _LAST_RETRY)
                continue
            retry, self.failure = _FIRST_RETRY, None
            if sent:
                self._moved = time.monotonic()
            else:
                self._wake.wait(_PAUSE)
