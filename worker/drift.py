"""Whether a worker's memory drifts: it grows and grows although the worker only ever does the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

SAMPLES = 60  # in a window
SLOW_FACTOR = 5  # growth too slow for one window counts when it has come to so many times the limit


class Sample(NamedTuple):
    """A worker's memory in MiB."""

    rss: float
    device: float


class Growth(NamedTuple):
    """What grew, and by how many MiB."""

    what: str
    mb: float


class Drift:
    """Compares the memory of now with that of a window before, each by its floor over a quarter of a window.

    A leak raises the floor; what pictures need while they are made only stands on it.
    """

    def __init__(self, *, limit_mb: float, window_s: float, warmup_s: float) -> None:
        self._limit_mb = limit_mb
        self._window_s = window_s
        self._warmup_s = warmup_s
        self._samples: deque[tuple[float, Sample]] = deque()  # of a window and a quarter
        self._next = warmup_s
        self._base: Sample | None = None

    def due(self, age_s: float) -> bool:
        """Whether a worker of this age should be looked at now."""
        return age_s >= self._next

    def restart(self, age_s: float) -> None:
        """Forget what was measured: from this age on the worker does something else, and warms up again."""
        self._samples.clear()
        self._base = None
        self._next = age_s + self._warmup_s

    def grown(self, age_s: float, sample: Sample) -> Growth | None:
        """Take in a sample of a worker of this age; return what has grown past the limit, if anything."""
        self._next = age_s + self._window_s / SAMPLES
        self._samples.append((age_s, sample))
        quarter_s = self._window_s / 4
        start = self._samples[0][0]
        if age_s - start < self._window_s + quarter_s:
            return None
        before = _floor(sample for at, sample in self._samples if at - start < quarter_s)
        now = _floor(sample for at, sample in self._samples if age_s - at < quarter_s)
        self._base = self._base or before
        self._samples.popleft()
        for what, high, low, base in zip(Sample._fields, now, before, self._base, strict=True):
            if high - low > self._limit_mb or high - base > SLOW_FACTOR * self._limit_mb:
                return Growth(what, round(max(high - low, high - base), 1))
        return None


def _floor(samples: Iterable[Sample]) -> Sample:
    return Sample(*(min(column) for column in zip(*samples, strict=True)))
