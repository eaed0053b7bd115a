"""How many requests this process has answered, and how long submits took: told to Redis about once a second, so that
every gateway tells Prometheus the same. In a request's path is an item of a dict, and no more.
"""

from __future__ import annotations

import itertools
import socket
import threading

from common.broker import Broker
from common.counting import Counting
from common.errors import RedisUnavailable
from common.histograms import CALL_SECONDS, Bounds
from common.storage.base import BaseStorage
from common.telemetry import get_logger

METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH"})
OTHER = "other"  # a method that somebody made up
UNMATCHED = "unmatched"  # no route has such a path, or takes such a method
ACCEPTED = 202
TELL_EVERY_S = 1.0
DISK_EVERY = 15  # tellings
BOUNDS = Bounds(CALL_SECONDS)

log = get_logger()


class Traffic:
    """One process's requests. It tells of them by itself once started, and of the disk that results are kept on."""

    def __init__(self, broker: Broker, storage: BaseStorage) -> None:
        self._broker = broker
        self._storage = storage
        self._counts: dict[str, int] = {}  # for the greenlets of one thread, as gunicorn has it
        self._counting = Counting(broker, self._counts.copy)
        self._stopping = threading.Event()

    def answered(self, route: str | None, method: str, status: int | None, seconds: float) -> None:
        """Count a request; without a status it was not answered."""
        asked = method if method in METHODS else OTHER
        self._add(f"requests|{route or UNMATCHED}|{asked}|{status or 0}")
        if status == ACCEPTED:
            self._add(f"submit|{BOUNDS.of(seconds)}")
            self._add("submit|sum", round(seconds * 1e6))

    def _add(self, field: str, count: int = 1) -> None:
        self._counts[field] = self._counts.get(field, 0) + count

    def tell(self) -> None:
        """Tell Redis what is new; raises RedisUnavailable."""
        self._counting.tell()

    def start(self) -> None:
        """Tell from now on. For a server; whoever only asks the application a few things needs none of it."""
        threading.Thread(target=self._run, name="traffic", daemon=True).start()

    def stop(self) -> None:
        """Tell a last time; what cannot be told now is lost."""
        self._stopping.set()
        self._try()

    def _run(self) -> None:
        for nth in itertools.count():
            self._try(with_disk=nth % DISK_EVERY == 0)
            if self._stopping.wait(TELL_EVERY_S):
                return

    def _try(self, *, with_disk: bool = False) -> None:
        try:
            self.tell()
            if with_disk and (disk := self._storage.disk()):
                self._broker.note_disk(socket.gethostname(), disk)
        except RedisUnavailable:  # which whoever asks for anything is told
            return
        except Exception as error:  # as where Redis refuses a command, or the disk is out of reach
            log.warning("traffic_not_told", error=type(error).__name__)
