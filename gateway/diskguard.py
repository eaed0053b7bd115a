"""Whether there is room for new results. A disk that fills up pauses new tasks before it is full."""

from __future__ import annotations

import time

from common.errors import StorageError, StorageFull
from common.settings import Settings
from common.storage.base import BaseStorage
from common.telemetry import get_logger

log = get_logger()

LOOK_EVERY_S = 1.0


class DiskGuard:
    """Pauses new tasks at one mark and lets them in again below a lower one. Looks only when it is asked."""

    def __init__(self, storage: BaseStorage, settings: Settings) -> None:
        self._storage = storage
        self._pause_percent = settings.disk_pause_percent
        self._resume_percent = settings.disk_resume_percent
        self._next_look = 0.0  # on time.monotonic's clock
        self._measured = True
        self._reason = ""
        self._warning = ""

    def check(self) -> None:
        """Raise StorageFull while new tasks are paused."""
        if reason := self.reason():
            raise StorageFull(reason)

    def reason(self) -> str:
        """Return why new tasks are paused, as of the last second, or nothing while they are not."""
        self._refresh()
        return self._reason

    def reasons(self) -> list[str]:
        """Return why the disk needs looking after: new tasks are paused, or soon will be."""
        self._refresh()
        return [reason for reason in (self._reason, self._warning) if reason]

    def _refresh(self) -> None:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_EVERY_S
            self._look()

    def _look(self) -> None:
        percent = self._used_percent()
        was_paused = bool(self._reason)
        near = percent is not None and percent >= self._resume_percent
        paused = percent is not None and percent >= (self._resume_percent if was_paused else self._pause_percent)
        full = f"the disk for results is {percent:g}% full; " if near else ""
        remedy = "free space in ZFLEET_DATA_DIR or lower ZFLEET_RETENTION_DAYS"
        again = f"new tasks are accepted again below {self._resume_percent:g}%: {remedy}"
        soon = f"new tasks are refused from {self._pause_percent:g}% on: {remedy}"
        self._reason = full + again if paused else ""
        self._warning = full + soon if near and not paused else ""
        if paused and not was_paused:
            log.error("storage_full", used_percent=percent)
        elif was_paused and not paused:
            log.info("storage_resumed", used_percent=percent)

    def _used_percent(self) -> float | None:
        measured = True
        try:
            share = self._storage.fullness()
        except (StorageError, OSError) as error:  # no reason to refuse tasks: a write will tell whether there is room
            share, measured = None, False
            if self._measured:
                log.warning("disk_not_measured", error=type(error).__name__)
        self._measured = measured
        return None if share is None else round(share * 100, 1)
