"""What the broker takes in and hands out, and how the hashes and rows of Redis are read into it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from common.cards import QueueDepth, WorkerCard
from common.inputs import steps_done
from common.schemas import (
    PRIORITIES,
    Attempt,
    ImageRef,
    ResolvedRequest,
    StageTimings,
    TaskError,
    TaskRecord,
    TaskStatus,
    TaskSummary,
)

Verdict = Literal["ok", "cancel", "lost"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NewTask:
    """A task on its way in. `cost`, what fair sharing counts, is megapixels x steps x pictures."""

    task_id: str
    tenant: str
    request: ResolvedRequest
    key_id: str = ""  # of the API key that it came with
    request_id: str = ""
    idempotency_key: str = ""
    body_hash: str = ""

    @property
    def cost(self) -> float:
        request = self.request
        steps = steps_done(request.steps, request.strength)
        return request.width * request.height / 1e6 * steps * request.n


class Submitted(NamedTuple):
    """What became of a submit: its id, whether this call made it, how many stand before it, seconds until done."""

    task_id: str
    created: bool
    position: int
    eta_seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Claimed:
    """A task that this worker holds, under the fence of this attempt."""

    task_id: str
    fence: int
    queue: str
    request: ResolvedRequest
    request_id: str
    queued_ms: int
    deadline_in_s: float | None
    alone: bool = False  # it was on a device when that worker died: no other run beside it


class Claim(NamedTuple):
    """The answer to a claim; `suspended` while an operator has paused the fleet with `rq suspend`. `left` names the
    models whose bell it rang for other workers: who waits there next hears its own ring.
    """

    tasks: Sequence[Claimed]
    suspended: bool
    left: Sequence[str] = ()


class Hold(NamedTuple):
    """A worker's claim to one task: id and fence."""

    task_id: str
    fence: int


class Reaped(NamedTuple):
    """A run taken back from a dead or silent worker, and what was done with it."""

    task_id: str
    fence: int
    outcome: Literal["requeued", "given_back", "quarantined", "canceled"]
    worker: str
    request_id: str


class Event(NamedTuple):
    """Something happened to a task: a state's name, or `progress`."""

    task_id: str
    name: str
    step: int
    steps: int


def when(milliseconds: str | int | None) -> datetime | None:
    return datetime.fromtimestamp(int(milliseconds) / 1000, UTC) if milliseconds else None


def claimed(row: list[Any]) -> Claimed:
    task_id, fence, queue, queued_ms, deadline_ms, request, request_id, alone = row
    return Claimed(
        task_id=task_id,
        fence=fence,
        queue=queue,
        request=ResolvedRequest.model_validate_json(request),
        request_id=request_id,
        queued_ms=queued_ms,
        deadline_in_s=deadline_ms / 1000 if deadline_ms else None,
        alone=bool(alone),
    )


def task_record(fields: Mapping[str, str], position: int | None, eta_seconds: float | None) -> TaskRecord:
    attempts = []
    for fence in range(1, int(fields["fence"]) + 1):
        if text := fields.get(f"attempt:{fence}"):
            attempt = json.loads(text)
            attempt["started_at"] = when(attempt["started_at"])
            attempt["ended_at"] = when(attempt.get("ended_at"))
            attempts.append(Attempt(**attempt))
    return TaskRecord(
        task_id=fields["id"],
        tenant=fields["tenant"],
        status=TaskStatus(fields["status"]),
        request=ResolvedRequest.model_validate_json(fields["request"]),
        request_id=fields["request_id"],
        step=int(fields["step"]),
        preview=fields.get("preview"),
        position=position,
        eta_seconds=eta_seconds,
        attempts=attempts,
        images=[ImageRef(**image) for image in json.loads(fields.get("images", "[]"))],
        error=TaskError.model_validate_json(fields["error"]) if "error" in fields else None,
        warnings=json.loads(fields.get("warnings", "[]")),
        stages=StageTimings.model_validate_json(fields["stages"]) if "stages" in fields else None,
        cancel_requested="cancel" in fields,
        created_at=datetime.fromtimestamp(int(fields["created_at"]) / 1000, UTC),
        started_at=when(fields.get("started_at")),
        finished_at=when(fields.get("finished_at")),
        expires_at=when(fields.get("expires_at")),
    )


def task_summary(task_id: str, fields: Sequence[str | None]) -> TaskSummary:
    status, model, created_at, finished_at = fields
    return TaskSummary(
        task_id=task_id,
        status=TaskStatus(status or ""),
        model=model or "",
        created_at=datetime.fromtimestamp(int(created_at or 0) / 1000, UTC),
        finished_at=when(finished_at),
    )


def queue_depth(name: str, queued: int, running: int, created_at: str | None, now_ms: int) -> QueueDepth | None:
    model, priority, tenant = [*name.split(".", 2), "", ""][:3]
    if priority not in PRIORITIES:
        return None  # somebody else's RQ queue in the same Redis
    return QueueDepth(
        name=name,
        model=model,
        priority=priority,
        tenant=tenant,
        queued=queued,
        running=running,
        oldest_age_seconds=(now_ms - int(created_at)) / 1000 if created_at else None,
    )


def worker_card(text: str) -> WorkerCard | None:
    """Return a worker's card, or None where another version of zfleet wrote one that this version cannot read."""
    try:
        return WorkerCard.model_validate_json(text)
    except ValidationError:
        return None
