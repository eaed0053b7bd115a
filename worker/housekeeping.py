"""Removes results past their retention, and what broken writes left behind, at every interval."""

from __future__ import annotations

import threading

from common.settings import Settings
from common.storage import open_storage
from common.telemetry import get_logger

log = get_logger()


class Housekeeping:
    """A thread that sweeps the storage while the supervisor lives."""

    def __init__(self, settings: Settings) -> None:
        self._retention_s = settings.retention_days * 86_400
        self._interval_s = settings.housekeeping_s
        self._storage = open_storage(settings)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        """Sweep now, and from then on at every interval."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the file it is at."""
        self._stop.set()

    def _run(self) -> None:
        while True:
            try:
                removed = self._storage.sweep(self._retention_s)
                log.info("storage_swept", removed=removed)
            except Exception as error:
                log.error("sweep_failed", error=type(error).__name__)
            if self._stop.wait(self._interval_s):
                return
