"""What a process counts by itself, for where nothing happens on Redis that could count: told from time to time."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Protocol


class Ledger(Protocol):
    """Whoever keeps the fleet's counters: the broker."""

    def add_counts(self, process: str, number: int, counts: Mapping[str, int]) -> None:
        """Add these, once for each number of a process."""


class Counting:
    """Tells by how much the counters of one process have grown. Any thread may tell; nothing new is told by nothing."""

    def __init__(self, ledger: Ledger, counts: Callable[[], Mapping[str, int]]) -> None:
        """`counts` returns all of the process's counters since its start, named as lua/_counts.lua has it."""
        self._ledger = ledger
        self._counts = counts
        self._process = secrets.token_hex(8)
        self._told: dict[str, int] = {}
        self._number = 0
        self._pending: dict[str, int] = {}  # what was told under this number; Redis may have heard it, or not
        self._lock = threading.Lock()  # of the telling

    def tell(self) -> None:
        """Tell what has been counted up to now; raises RedisUnavailable, and then nothing is lost nor told twice."""
        with self._lock:
            if self._pending:
                self._send()
            grown = {field: count - self._told.get(field, 0) for field, count in self._counts().items()}
            self._pending = {field: count for field, count in grown.items() if count}
            if self._pending:
                self._send()

    def _send(self) -> None:
        self._ledger.add_counts(self._process, self._number, self._pending)
        for field, count in self._pending.items():
            self._told[field] = self._told.get(field, 0) + count
        self._pending, self._number = {}, self._number + 1
