"""Whether a figure grows over a run, or only wavers.

The slope is Theil's: the median of the slopes between all pairs of samples (H. Theil, 1950), which a few outliers do
not move. Its confidence interval is Sen's (P. K. Sen, "Estimates of the regression coefficient based on Kendall's tau",
JASA 63, 1968): of the N = n(n-1)/2 slopes in order, the ones at (N - C)/2 and (N + C)/2, where

    C = 1.96 · sqrt(n (n - 1) (2n + 5) / 18)

is Kendall's S at 95 %. A figure drifts when its whole interval lies above zero and it has grown by more than its
tolerance: samples of one process depend on each other, which makes the interval narrower than it ought to be, and the
tolerance keeps a step of one page from being called a leak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

Z_95 = 1.96
FEWEST = 8  # samples; with fewer the interval says nothing


@dataclass(frozen=True, kw_only=True)
class Trend:
    """How much a figure grew from the first sample to the last, with its 95 % interval, in the figure's own unit."""

    level: float  # the median
    growth: float
    low: float
    high: float
    tolerance: float

    @property
    def drifts(self) -> bool:
        return self.low > 0 and self.growth > self.tolerance


def trend(times: ArrayLike, values: ArrayLike, tolerance: float) -> Trend:
    """Return the trend of `values` sampled at `times` (seconds, rising); raises ValueError for too few samples."""
    at, figures = np.asarray(times, float), np.asarray(values, float)
    count = len(figures)
    if count < FEWEST:
        raise ValueError(f"{count} samples are too few for a trend; {FEWEST} will do")
    first, second = np.triu_indices(count, k=1)
    slopes = np.sort((figures[second] - figures[first]) / (at[second] - at[first]))
    margin = Z_95 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, math.floor((len(slopes) - margin) / 2))
    high = min(len(slopes) - 1, math.ceil((len(slopes) + margin) / 2))
    whole = float(at[-1] - at[0])
    return Trend(
        level=float(np.median(figures)), growth=float(np.median(slopes)) * whole, low=float(slopes[low]) * whole,
        high=float(slopes[high]) * whole, tolerance=tolerance,
    )  # fmt: skip
