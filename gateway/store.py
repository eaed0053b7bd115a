"""The pictures' storage as the gateway asks it: no call holds up those that do not need it, or lasts longer than a
client would wait. And whether it answers at all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from common.errors import NotStored, StorageError
from common.settings import Settings
from common.storage.base import BaseStorage, Disk
from common.telemetry import get_logger
from gateway.aside import Threads, within

log = get_logger()

T = TypeVar("T")
P = ParamSpec("P")

SLOW_S = 3.0  # a call that took as long and then failed says that the storage hangs
SILENT_S = 5.0  # then nobody else waits for it for so long
DISK_LIMIT_S = 1.0  # how full a disk is, it knows at once or not at all
LOOK_EVERY_S = 5.0
MOMENT_S = 0.5  # whoever asks waits so long for a look that has just begun


class Store(BaseStorage):
    """Another storage, with every call aside and within its limit; all of them raise StorageError beyond that.

    Once it hangs, calls fail at once for a few seconds, so that those who come meanwhile do not pile up, and what makes
    several calls does not wait for each.
    """

    def __init__(self, storage: BaseStorage, settings: Settings) -> None:
        super().__init__(settings)
        self._storage = storage
        self._threads = Threads(8)
        self._disk_threads = Threads(1)  # apart, as new tasks wait for it
        self._silent_until = 0.0  # on time.monotonic's clock
        self._answered = 0.0  # when it last did, on the same

    def put(self, key: str, data: bytes) -> None:
        self._call(self._storage.put, key, data)

    def read(self, key: str) -> bytes:
        return self._call(self._storage.read, key)

    def exists(self, key: str) -> bool:
        return self._call(self._storage.exists, key)

    def head(self, key: str, count: int) -> bytes:
        return self._call(self._storage.head, key, count)

    def touch(self, key: str) -> None:
        self._call(self._storage.touch, key)

    def delete(self, key: str) -> None:
        self._call(self._storage.delete, key)

    def remove(self, folder: str) -> None:
        self._call(self._storage.remove, folder)

    def check(self) -> None:
        self._call(self._storage.check)

    def sweep(self, older_than_s: float) -> int:
        return self._storage.sweep(older_than_s)

    def path(self, key: str) -> Path | None:
        return self._storage.path(key)

    def link(self, key: str, seconds: int) -> str | None:
        return self._storage.link(key, seconds)

    def disk(self) -> Disk | None:
        return self._look(self._storage.disk)

    def fullness(self) -> float | None:
        return self._look(self._storage.fullness)

    def _look(self, call: Callable[[], T]) -> T:
        try:
            return self._disk_threads.run_within(DISK_LIMIT_S, call)
        except TimeoutError:
            raise self._silence() from None

    def _call(self, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        began = time.monotonic()
        if began < self._silent_until:
            raise self._silence()
        limit_s = self._storage.limit_s
        try:
            if self._storage.over_network:
                done = within(limit_s, call, *args, **named)
            else:
                done = self._threads.run_within(limit_s, call, *args, **named)
        except TimeoutError:
            self._hangs(began)
            raise self._silence() from None
        except NotStored:
            self._answers()
            raise
        except StorageError:
            if time.monotonic() - began >= SLOW_S:
                self._hangs(began)
            raise
        self._answers()
        return done

    def _answers(self) -> None:
        self._answered, self._silent_until = time.monotonic(), 0.0

    def _hangs(self, began: float) -> None:
        """Spare others the wait, unless the storage has answered one of them since: then it has only much to do."""
        now = time.monotonic()
        log.warning("storage_hangs", duration_ms=round((now - began) * 1000, 1))
        if self._answered < began:
            self._silent_until = now + SILENT_S

    @staticmethod
    def _silence() -> StorageError:
        return StorageError("the storage for pictures does not answer; see `zfleet doctor`")


class Reach:
    """Whether a storage answers, as of the last look. A look goes on beside whoever asks, and begins when one asks."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._began = 0.0  # on time.monotonic's clock
        self._ended = threading.Event()
        self._ended.set()
        self._next_look = 0.0
        self._trouble = ""

    def reasons(self) -> list[str]:
        """Return why the storage needs looking after."""
        now = time.monotonic()
        if self._ended.is_set() and now >= self._next_look:
            self._ended.clear()
            self._began, self._next_look = now, now + LOOK_EVERY_S
            threading.Thread(target=self._look, name="storage", daemon=True).start()
            self._ended.wait(MOMENT_S)
        waited_s = time.monotonic() - self._began
        if not self._ended.is_set() and waited_s >= SLOW_S:
            return [f"the storage for pictures has not answered for {waited_s:.0f} s; see `zfleet doctor`"]
        return [self._trouble] if self._trouble else []

    def _look(self) -> None:
        try:
            if (disk := self._storage.disk()) is None:
                self._storage.check()
            elif disk.read_only:
                raise StorageError("the disk for results is mounted read-only; look at it, and at the kernel's log")
            trouble = ""
        except StorageError as error:
            trouble = f"pictures cannot be kept or fetched: {error.message}"
        except Exception as error:  # a look must end
            trouble = f"pictures cannot be kept or fetched ({type(error).__name__}); see `zfleet doctor`"
        if bool(trouble) != bool(self._trouble):
            log.warning("storage_away", reason=trouble) if trouble else log.info("storage_back")
        self._trouble = trouble
        self._ended.set()
