"""What a supervisor does with the storage, in a thread of its own: one that hangs must not keep it from its workers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from common.telemetry import get_logger

log = get_logger()

BACKLOG = 1000  # of what waits for a storage that hangs; what comes beyond is left to a sweep


class Tidying:
    """Does one thing after the other, whenever the storage lets it."""

    def __init__(self) -> None:
        self._jobs = queue.Queue[Callable[[], None]](BACKLOG)
        self._thread = threading.Thread(target=self._run, name="tidying", daemon=True)
        self._thread.start()

    def do(self, job: Callable[[], None]) -> bool:
        """Take over what is to be done; return False where too much waits already."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    def finish(self, within_s: float) -> bool:
        """Wait until all of it is done, no longer than this; return whether it is."""
        done = threading.Event()
        return self.do(done.set) and done.wait(within_s)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception as error:  # the next one may do
                log.error("tidying_failed", error=type(error).__name__, message=str(error))
