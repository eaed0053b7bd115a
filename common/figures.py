"""What the fleet counts, and how it stood of late, on Redis. lua/_counts.lua says how counters are kept."""

from __future__ import annotations

import time
from collections.abc import Mapping

from common import history, keys
from common.fleet import RECENT_S, Recent
from common.history import STEPS, WINDOWS, Point, Sample
from common.link import Link
from common.storage.base import Disk

SAMPLES = STEPS + 1  # that are kept of each window
RECENT = "15m"
RECENT_TTL_S = 2.0  # how long it is taken as known what was done of late


class Figures(Link):
    """The part of the broker that counts. All methods raise RedisUnavailable."""

    _recent = Recent()
    _recent_until = 0.0

    def add_counts(self, process: str, number: int, counts: Mapping[str, int]) -> None:
        """Add to the fleet's counters what this process has counted by itself since it told last.

        What is told again under the same number counts once.
        """
        self._run("add_counts", process, number, *(part for field in counts.items() for part in field))

    def counts(self) -> dict[str, int]:
        """Return the fleet's counters."""
        found: dict[str, str] = self._patiently(lambda: self._redis.hgetall(keys.COUNTS))
        return {field: int(count) for field, count in found.items()}

    def sample(self) -> bool:
        """Note how the fleet stands, if nobody has in this interval; return whether it was due. For each second."""
        return bool(self._run("sample", SAMPLES, *(part for window in WINDOWS.items() for part in window)))

    def history(self, window: str) -> list[Point]:
        """Return the steps of one of WINDOWS, oldest first."""
        return history.points(self._samples(window), WINDOWS[window], self.clock_ms())

    def recent(self) -> Recent:
        """Return what was done in the last quarter of an hour, as of the last seconds."""
        if time.monotonic() >= self._recent_until:
            self._recent = history.recent(self._samples(RECENT), RECENT_S, WINDOWS[RECENT], self.clock_ms())
            self._recent_until = time.monotonic() + RECENT_TTL_S
        return self._recent

    def note_disk(self, host: str, disk: Disk) -> None:
        """Tell of the disk that a host keeps results on. It is forgotten when it is not told of for a minute."""
        self._run("note_disk", host, disk.free, disk.size)

    def disks(self) -> dict[str, Disk]:
        """Return the disks that results are kept on, by host."""
        now_ms = self.clock_ms()
        found: dict[str, str] = self._patiently(lambda: self._redis.hgetall(keys.DISKS))
        told = {host: text.split(" ") for host, text in found.items()}
        return {
            host: Disk(int(free), int(size))
            for host, (free, size, at) in told.items()
            if now_ms - int(at) < keys.DISK_TTL_S * 1000
        }

    def memory_bytes(self) -> int:
        """Return the memory that Redis uses for data."""
        return self._patiently(lambda: int(self._redis.info("memory")["used_memory"]))

    def _samples(self, window: str) -> list[Sample]:
        texts: list[str] = self._patiently(lambda: self._redis.lrange(keys.HISTORY + window, 0, -1))
        return [Sample.model_validate_json(text) for text in texts]
