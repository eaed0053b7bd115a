"""What the fleet did of late, from samples of its counters: differences, shares and quantiles. Knows no Redis."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Literal

from pydantic import Field

from common.fleet import Recent
from common.histograms import SECONDS, Bounds
from common.schemas import PRIORITIES, Priority, Stored, Wire

Window = Literal["15m", "6h", "7d"]
WINDOWS: Mapping[str, int] = {"15m": 10, "6h": 240, "7d": 7200}  # with the seconds of a step
STEPS = 90  # of a window, at most
SLACK = 0.5  # of a step: two samples that are no further apart than this and a step have none missing between them
OUTCOMES = ("succeeded", "failed", "canceled", "expired")
TROUBLE = ("crashes", "fuses")  # which every sample counts, but for those of an earlier version
TOOK = "took|"
DURATIONS = Bounds(SECONDS)


class Waiting(Stored):
    """What waits of a model at one priority, in a sample."""

    queued: int
    oldest_age_ms: int | None = None


class Sample(Stored):
    """How the fleet stood at some moment, `at` ms since 1970; what nobody told is None.

    `counts` are counters summed over models: `submitted`, `images`, `tasks|<outcome>`, `took|<bound>`, `crashes`,
    `fuses`, and `joules` once a GPU has told of any. They only grow, unless Redis has lost them. `lines` has what
    waits, by model and priority.
    """

    at: int
    counts: Mapping[str, int]
    queued: int
    running: int
    oldest_age_ms: int | None = None
    lines: Mapping[str, Mapping[Priority, Waiting]] | None = None  # which an earlier version has not told
    workers: int
    gpu_utilisation_percent: float | None = None
    gpu_memory_used_mb: int | None = None


class Done(Wire):
    """What was done within some time."""

    submitted: int | None = None
    succeeded: int | None = None
    failed: int | None = None
    canceled: int | None = None
    expired: int | None = None
    images: int | None = None
    crashes: int | None = Field(default=None, description="Of workers that died unasked or had to be killed.")
    fuses: int | None = Field(default=None, description="Tasks stopped by their deadline or their model's run limit.")
    error_ratio: float | None = Field(
        default=None, description="Failed and expired, as a share of those and the succeeded; null without any."
    )
    p50_seconds: float | None = Field(
        default=None, description="From submit to result, of tasks that succeeded; null without any."
    )
    p95_seconds: float | None = None
    joules_per_image: float | None = Field(
        default=None, description="What GPUs used, idling ones included; null without an image, or a GPU that tells."
    )


class QueuedThen(Wire):
    """What waited of a model at one priority, of all tenants together."""

    model: str
    priority: Priority
    queued: int
    oldest_age_seconds: float | None = Field(description="Of the oldest task that stood first for its tenant.")


class Point(Done):
    """A step of a chart: what was done within it, and how the fleet stood at its end. Null is what nobody knows."""

    at: datetime = Field(description="The end of the step.")
    queued: int | None = None
    running: int | None = None
    oldest_age_seconds: float | None = None
    queues: Sequence[QueuedThen] | None = Field(default=None, description="Those in which anything waited.")
    workers: int | None = None
    gpu_utilisation_percent: float | None = Field(default=None, description="The mean of the GPUs.")
    gpu_memory_used_mb: int | None = Field(default=None, description="Of all GPUs.")


class History(Wire):
    """GET /api/history: whole steps, oldest first. Counts are per step."""

    window: Window
    step_seconds: int
    points: Sequence[Point]


def points(samples: Sequence[Sample], step_s: float, now_ms: int) -> list[Point]:
    """Return the last steps between these samples and up to now, oldest first.

    Where samples are missing there are points of nulls, and the step after them has no counts, as nobody knows how much
    of them belongs into it.
    """
    samples = _in_order(samples)
    found: deque[Point] = deque(maxlen=STEPS)
    for before, after in pairwise(samples):
        missing = _missing(before.at, after.at, step_s)
        found += _nothing(after.at, missing, step_s)
        made = Done() if missing else done(difference(before.counts, after.counts))
        found.append(_point(after, made))
    if samples:
        missing = _missing(samples[-1].at, now_ms, step_s)
        found += _nothing(round(samples[-1].at + (missing + 1) * step_s * 1000), missing, step_s)
    return list(found)


def recent(samples: Sequence[Sample], window_s: float, step_s: float, now_ms: int) -> Recent:
    """Return what was done within `window_s` before the newest sample, back to where samples are missing.

    Nothing is known of late where more than one is missing since.
    """
    samples = _in_order(samples)
    total: Counter[str] = Counter()
    seconds = 0.0
    for before, after in reversed(list(pairwise(samples))):
        seconds_more = (samples[-1].at - before.at) / 1000
        if _missing(before.at, after.at, step_s) or seconds_more > window_s + SLACK * step_s:
            break
        total += difference(before.counts, after.counts)
        seconds = seconds_more
    if not seconds or _missing(samples[-1].at, now_ms, step_s) > 1:
        return Recent()
    made = done(total)
    return Recent(
        window_seconds=round(seconds),
        tasks_per_minute=round(sum(total[f"tasks|{name}"] for name in OUTCOMES) / seconds * 60, 3),
        images_per_minute=round(total["images"] / seconds * 60, 3),
        crashes=made.crashes,
        fuses=made.fuses,
        error_ratio=made.error_ratio,
        p50_seconds=made.p50_seconds,
        p95_seconds=made.p95_seconds,
        joules_per_image=made.joules_per_image,
    )


def difference(before: Mapping[str, int], after: Mapping[str, int]) -> Counter[str]:
    """Return by how much counters grew; those that went back were lost meanwhile, and began anew from nothing."""
    lost = any(after.get(name, 0) < count for name, count in before.items())
    floor = {name: after[name] for name in TROUBLE if name in after} | dict(before)  # a first count may be of long ago
    return Counter({name: count - (0 if lost else floor.get(name, 0)) for name, count in after.items()})


def done(counts: Mapping[str, int]) -> Done:
    """Return what counters say that grew by so much."""
    outcomes = {name: counts.get(f"tasks|{name}", 0) for name in OUTCOMES}
    lost = outcomes["failed"] + outcomes["expired"]
    joules, images = counts.get("joules", 0), counts.get("images", 0)
    took = {name.removeprefix(TOOK): count for name, count in counts.items() if name.startswith(TOOK)}
    return Done(
        submitted=counts.get("submitted", 0),
        images=images,
        crashes=counts.get("crashes", 0),
        fuses=counts.get("fuses", 0),
        error_ratio=round(lost / (lost + outcomes["succeeded"]), 4) if lost + outcomes["succeeded"] else None,
        p50_seconds=DURATIONS.quantile(0.5, took),
        p95_seconds=DURATIONS.quantile(0.95, took),
        joules_per_image=round(joules / images, 2) if joules and images else None,
        **outcomes,
    )


def _in_order(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return these samples without those of a time that came once more, as Redis' clock was set back."""
    found: list[Sample] = []
    for sample in reversed(samples):
        if not found or sample.at <= found[-1].at:
            found.append(sample)
    return found[::-1]


def _missing(before_ms: int, after_ms: int, step_s: float) -> int:
    """Return how many samples there should have been between these moments."""
    return max(0, int((after_ms - before_ms) / 1000 / step_s - SLACK))


def _nothing(before_ms: int, missing: int, step_s: float) -> list[Point]:
    """Return the last of so many steps before a moment of which nothing is known."""
    return [Point(at=_when(before_ms - nth * step_s * 1000)) for nth in range(min(missing, STEPS), 0, -1)]


def _point(sample: Sample, made: Done) -> Point:
    return Point(
        **made.model_dump(),
        at=_when(sample.at),
        queued=sample.queued,
        running=sample.running,
        oldest_age_seconds=_seconds(sample.oldest_age_ms),
        queues=None if sample.lines is None else _queues(sample.lines),
        workers=sample.workers,
        gpu_utilisation_percent=sample.gpu_utilisation_percent,
        gpu_memory_used_mb=sample.gpu_memory_used_mb,
    )


def _queues(lines: Mapping[str, Mapping[Priority, Waiting]]) -> list[QueuedThen]:
    return [
        QueuedThen(
            model=model, priority=priority, queued=waits.queued, oldest_age_seconds=_seconds(waits.oldest_age_ms)
        )
        for model, found in sorted(lines.items())
        for priority in PRIORITIES
        if (waits := found.get(priority))
    ]


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _when(milliseconds: float) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
