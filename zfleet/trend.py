"""GET /api/history, as far as `zfleet top` shows it."""

from __future__ import annotations

from collections.abc import Sequence

from common.schemas import Stored


class Point(Stored):
    """What was done in one step of the history; null is what nobody knows."""

    images: int | None = None
    error_ratio: float | None = None
    p50_seconds: float | None = None
    p95_seconds: float | None = None


class History(Stored):
    """The steps of the last while, oldest first."""

    step_seconds: float
    points: Sequence[Point]
