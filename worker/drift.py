"""Whether a worker's memory drifts: it grows and grows although the worker only ever does the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

SAMPLES = 60  # in a window
SLOW_FACTOR = 5  # growth too slow for one window counts when it has come to so many times the limit
RETURNS = 3  # of the same models: a leak grows from each of them to the next, what is loaded only once does not
MOST_SETS = 64  # of models that are remembered


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

    A leak raises the floor; what pictures need while they are made only stands on it. With other models the worker has
    another floor, so a window never reaches past a change of them; see Stays for what grows across changes.
    """

    def __init__(self, *, limit_mb: float, window_s: float, warmup_s: float) -> None:
        self._limit_mb = limit_mb
        self._window_s = window_s
        self._warmup_s = warmup_s
        self._samples: deque[tuple[float, Sample]] = deque()  # of a window and a quarter
        self._next = self._warm_at = warmup_s
        self._base: Sample | None = None
        self._stays = Stays(limit_mb)
        self._models = 0
        self._lowest: Sample | None = None  # since these models are there
        self._left_behind: Growth | None = None  # found as others came

    def due(self, age_s: float) -> bool:
        """Whether a worker of this age should be looked at now."""
        return age_s >= self._next

    def restart(self, age_s: float, models: int) -> None:
        """Hear that from this age on other models are there, of which this number is the name: it warms up again."""
        if self._lowest is not None:
            self._left_behind = self._stays.end(self._models, self._lowest)
        self._models, self._lowest = models, None
        self._samples.clear()
        self._base = None
        self._next = max(age_s, self._warmup_s)
        self._warm_at = age_s + self._warmup_s

    def grown(self, age_s: float, sample: Sample) -> Growth | None:
        """Take in a sample of a worker of this age; return what has grown past the limit, if anything."""
        self._next = age_s + self._window_s / SAMPLES
        self._lowest = sample if self._lowest is None else _floor((self._lowest, sample))
        if age_s < self._warm_at or self._left_behind:
            return self._left_behind
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


class Stays:
    """Compares the floor of a stay, the time between two changes of models, with earlier stays of the same models.

    However short they are, each has the moment after its load in it, so that like is compared with like.
    """

    def __init__(self, limit_mb: float) -> None:
        self._limit_mb = limit_mb
        self._first: dict[int, Sample] = {}  # by the models; those not seen for the longest time come first
        self._last: dict[int, deque[Sample]] = {}

    def end(self, models: int, floor: Sample) -> Growth | None:
        """Take in the floor of a stay that has ended; return what leaks from stay to stay, if anything."""
        first = self._first.pop(models, floor)
        self._first[models] = first
        last = self._last.setdefault(models, deque(maxlen=RETURNS + 1))
        last.append(floor)
        if len(self._first) > MOST_SETS:
            oldest = next(iter(self._first))
            del self._first[oldest], self._last[oldest]
        for what, base, floors in zip(Sample._fields, first, zip(*last, strict=True), strict=True):
            rises = [high - low for low, high in pairwise(floors)]
            leaks = len(rises) == RETURNS and RETURNS * min(rises) > self._limit_mb
            if leaks or floors[-1] - base > SLOW_FACTOR * self._limit_mb:
                return Growth(what, round(floors[-1] - base, 1))
        return None


def _floor(samples: Iterable[Sample]) -> Sample:
    return Sample(*(min(column) for column in zip(*samples, strict=True)))
