"""Histograms as the fleet's counters keep them: their bounds, and what can be told from how many were within each."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from itertools import pairwise

# Bounds, ascending. A value counts for the first that it does not exceed.
SECONDS = "0.1 0.2 0.3 0.5 0.75 1 1.5 2 3 5 7.5 10 15 20 30 60 120 300 600 1800 +Inf"  # of a task, from its submit
STAGE_SECONDS = "0.001 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30 60 300 +Inf"  # of one stage of it
CALL_SECONDS = "0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 +Inf"  # of a call over HTTP
BATCH_SIZES = "1 2 3 4 6 8 12 16 24 32 +Inf"  # pictures that advance together


class Bounds:
    """The bounds of a histogram, by their text."""

    def __init__(self, text: str) -> None:
        self.names = tuple(text.split())
        self._values = [float(name) for name in self.names]

    def of(self, value: float) -> str:
        """Return the bound that a value counts for."""
        return self.names[bisect_left(self._values, value)]

    def quantile(self, q: float, counts: Mapping[str, int]) -> float | None:
        """Return the q-quantile by linear interpolation within its bucket, as Prometheus' histogram_quantile has it.

        `counts` says how many count for each bound. None where there are none; the largest finite bound for what is
        beyond that.
        """
        total = sum(counts.get(name, 0) for name in self.names)
        if not total:
            return None
        rank, below = q * total, 0
        for (low, high), name in zip(pairwise([0.0, *self._values]), self.names, strict=True):
            within = counts.get(name, 0)
            if within and below + within >= rank:
                return low if math.isinf(high) else low + (high - low) * max(0.0, rank - below) / within
            below += within
        return self._values[-2]
