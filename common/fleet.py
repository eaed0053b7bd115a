"""The fleet in one picture, as GET /api/fleet shows it: what waits, who works on what, how it went of late."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from pydantic import Field

from common.cards import Health, QueueDepth, WorkerCard
from common.records import when
from common.schemas import PRIORITIES, Priority, TaskStatus, Wire

RECENT_S = 900  # that `recent` looks back over
RUN = ("status", "tenant", "model", "step", "steps", "started_at")  # what `running` reads of a record


class LineDepth(Wire):
    """What waits and runs of a model at one priority, of all tenants together."""

    model: str
    priority: Priority
    queued: int
    running: int
    oldest_age_seconds: float | None = Field(description="Of the task that waits longest; null: none waits.")


class Run(Wire):
    """A task that a worker holds."""

    task_id: str
    tenant: str
    model: str
    step: int
    steps: int
    started_at: datetime


class WorkerView(WorkerCard):
    """A worker as it last described itself, and what it is at."""

    runs: Sequence[Run] = Field(description="The tasks it holds now; `running` is as old as its last beat.")


class Recent(Wire):
    """How it went in the last minutes; a figure that nobody knows is null."""

    window_seconds: int = RECENT_S
    tasks_per_minute: float | None = Field(default=None, description="That ended, whichever way.")
    images_per_minute: float | None = None
    crashes: int | None = Field(default=None, description="Of workers that died unasked or had to be killed.")
    fuses: int | None = Field(default=None, description="Tasks stopped by their deadline or their model's run limit.")
    error_ratio: float | None = Field(default=None, description="Failed and expired, of those and the succeeded.")
    p50_seconds: float | None = Field(default=None, description="From submit to picture: half were as fast.")
    p95_seconds: float | None = None
    joules_per_image: float | None = Field(
        default=None, description="What GPUs used, idling ones included; null without an image, or a GPU that tells."
    )


class Fleet(Wire):
    """GET /api/fleet, and the data of each event of its stream."""

    at: datetime
    health: Health
    suspended: bool = Field(description="Whether claims are paused; submits are accepted.")
    queues: Sequence[LineDepth]
    workers: Sequence[WorkerView]
    recent: Recent
    drained_away: Sequence[str] = Field(
        default=(), description="Slots that are drained and where no worker is; whoever comes there claims nothing."
    )


class Slot(Wire):
    """The answer to a worker's being resumed: its name, or that of its place where none is there."""

    name: str
    drained: bool


class Suspended(Wire):
    """The answer to a pause, and to its end."""

    suspended: bool


def running(task_id: str, fields: Sequence[str | None]) -> Run | None:
    """Return a task that runs from the RUN of its record; None for any other."""
    status, tenant, model, step, steps, started_at = fields
    began = when(started_at)
    if status != TaskStatus.RUNNING or began is None:
        return None
    return Run(
        task_id=task_id,
        tenant=tenant or "",
        model=model or "",
        step=int(step or 0),
        steps=int(steps or 0),
        started_at=began,
    )


def lines(queues: Iterable[QueueDepth]) -> list[LineDepth]:
    """Return the queues summed over their tenants, by model and priority."""
    found: dict[tuple[str, Priority], list[QueueDepth]] = {}
    for queue in queues:
        found.setdefault((queue.model, queue.priority), []).append(queue)
    ordered = sorted(found.items(), key=lambda item: (item[0][0], PRIORITIES.index(item[0][1])))
    return [_line(model, priority, members) for (model, priority), members in ordered]


def _line(model: str, priority: Priority, queues: Sequence[QueueDepth]) -> LineDepth:
    ages = [queue.oldest_age_seconds for queue in queues if queue.oldest_age_seconds is not None]
    return LineDepth(
        model=model,
        priority=priority,
        queued=sum(queue.queued for queue in queues),
        running=sum(queue.running for queue in queues),
        oldest_age_seconds=max(ages, default=None),
    )
