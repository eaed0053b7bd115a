"""What the broker takes in and hands out, and how the hashes and rows of Redis are read into it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from common.cards import QueueDepth, WorkerCard, slot_of
from common.errors import FleetError, IdempotencyConflict, QueueFull, QuotaUsedUp, TooLate
from common.inputs import steps_done
from common.schemas import (
    PRIORITIES,
    Attempt,
    Delivery,
    ImageRef,
    Priority,
    ResolvedRequest,
    StageTimings,
    TaskError,
    TaskRecord,
    TaskStatus,
    TaskSummary,
)

ETA_ERROR_BOUNDS = ("0.05", "0.1", "0.2", "0.3", "0.5", "1", "2", "+Inf")  # as finish.lua writes them
COST_PARTS = 2**20  # of a unit; sums of such costs are exact in whatever order, so that equal turns stay equal

Verdict = Literal["ok", "cancel", "lost"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NewTask:
    """A task on its way in. `cost`, what fair sharing counts, is megapixels x steps x pictures."""

    task_id: str
    tenant: str
    request: ResolvedRequest
    key_id: str = ""  # of the API key that it came with
    max_queued: int | None = None  # tasks of that key that may stand in line, this one among them
    reject_if_late: bool = False  # refuse it if by the estimate it would end after its deadline_s
    request_id: str = ""
    traceparent: str = ""  # where it is traced: what its spans are children of
    idempotency_key: str = ""
    body_hash: str = ""
    retry_of: str = ""  # the task that this one does over

    @property
    def cost(self) -> float:
        request = self.request
        steps = steps_done(request.steps, request.strength)
        exact = request.width * request.height / 1e6 * steps * request.n
        return max(1, round(exact * COST_PARTS)) / COST_PARTS


class Submitted(NamedTuple):
    """What became of a submit: its id, whether this call made it, how many start before it, seconds until done."""

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
    traceparent: str = ""  # '' where it is not traced
    waited_ms: int = 0  # of queued_ms, since it last came into line; known where it is traced


class Claim(NamedTuple):
    """The answer to a claim; `suspended` while an operator has paused the fleet, or drained the worker. `left` names
    the models whose bell it rang for other workers: who waits there next hears its own ring.
    """

    tasks: Sequence[Claimed]
    suspended: bool
    left: Sequence[str] = ()


class Beaten(NamedTuple):
    """The answer to a beat: whether RQ still knows the worker, a verdict for each hold, and whether an operator wants
    it to make room for a fresh one.
    """

    registered: bool
    verdicts: Sequence[Verdict]
    restart: bool


class Hold(NamedTuple):
    """A worker's claim to one task: id and fence."""

    task_id: str
    fence: int


Fate = Literal["requeued", "given_back", "quarantined", "canceled"]  # of a run that is taken back
Fuse = Literal["run_limit", "deadline"]  # a limit that stopped a task: its model's, or its own


class Reaped(NamedTuple):
    """A run taken back from a dead or silent worker, and what was done with it."""

    task_id: str
    fence: int
    outcome: Fate
    worker: str
    request_id: str


class Traced(NamedTuple):
    """What a task's trace tells of one attempt, and of its wait for that; None where it was never begun."""

    traceparent: str
    request_id: str
    model: str
    in_line_ms: int  # since 1970, when it came into line for it
    attempt: Attempt | None


class Moved(NamedTuple):
    """A task that was found overdue, or standing nowhere, and the request that it came with."""

    task_id: str
    request_id: str


class EtaErrors(NamedTuple):
    """How far off a model's estimates were, |actual - estimated| / actual."""

    buckets: Sequence[tuple[str, int]]  # bound, as "0.05" … "+Inf", and how many tasks were within it
    sum: float  # of all errors


class Tally(NamedTuple):
    """What became of a submit's count: `limit` may come at once, `remaining` of them now, all again after `reset_s`.

    One that was `limited` was not counted, and would be let through after `retry_after_s`.
    """

    limited: bool
    limit: int
    remaining: int
    reset_s: float
    retry_after_s: float


class Errand(NamedTuple):
    """A delivery that a courier has under way, under the fence of this try. `tries` counts this one."""

    delivery_id: str
    task_id: str
    event: str
    fence: int
    tries: int
    tenant: str
    made_at: datetime
    request_id: str = ""  # of its task

    @property
    def about(self) -> Mapping[str, str | int]:
        """What a line of the log says of which delivery it is about."""
        return {"delivery_id": self.delivery_id, "task_id": self.task_id, "request_id": self.request_id}


class Stray(NamedTuple):
    """A delivery that stood nowhere, and its task."""

    delivery_id: str
    task_id: str
    request_id: str


class Errands(NamedTuple):
    """What a courier took, and whether more stands in line."""

    taken: Sequence[Errand]
    left: bool


class WebhookSecrets(NamedTuple):
    """What a tenant's deliveries are signed with: one secret and, for a day, the one before it as well."""

    current: bytes
    previous: bytes | None = None
    previous_until: datetime | None = None


class Event(NamedTuple):
    """Something happened to a task: a state's name, or `progress`."""

    task_id: str
    name: str
    step: int
    steps: int


def when(milliseconds: str | int | None) -> datetime | None:
    return datetime.fromtimestamp(int(milliseconds) / 1000, UTC) if milliseconds else None


def claimed(row: list[Any]) -> Claimed:
    task_id, fence, queue, queued_ms, deadline_ms, request, request_id, alone, traceparent, waited_ms = row
    return Claimed(
        task_id=task_id,
        fence=fence,
        queue=queue,
        request=ResolvedRequest.model_validate_json(request),
        request_id=request_id,
        queued_ms=queued_ms,
        deadline_in_s=deadline_ms / 1000 if deadline_ms else None,
        alone=bool(alone),
        traceparent=traceparent,
        waited_ms=waited_ms,
    )


def errand(row: list[Any]) -> Errand:
    delivery_id, task_id, event, fence, tries, tenant, made_at, request_id = row
    made = datetime.fromtimestamp(made_at / 1000, UTC)
    return Errand(delivery_id, task_id, event, fence, tries, tenant, made, request_id)


def deliveries(fields: Mapping[str, str]) -> list[Delivery]:
    """Return the deliveries in a task's record, oldest first."""
    if not fields.get("webhook"):
        return []
    told = {name: json.loads(text) for name, text in fields.items() if name.startswith("delivery:")}
    return [
        Delivery(
            id=f"{fields['id']}-{name.removeprefix('delivery:')}",
            event=delivery["event"],
            state=delivery["state"],
            tries=delivery["tries"],
            last_status=delivery.get("last_status"),
            last_error=delivery.get("last_error"),
            last_try_at=when(delivery.get("last_at")),
            next_try_at=when(delivery.get("next_at")),
        )
        for name, delivery in sorted(told.items(), key=lambda item: _place(item[0]))
    ]


def _place(name: str) -> tuple[bool, int]:
    """Return where `delivery:started-<fence>` or `delivery:ended` belongs; by time, many are of one millisecond."""
    _, _, fence = name.partition("-")
    return not fence, int(fence or 0)


def attempt(text: str) -> Attempt:
    told = json.loads(text)
    return Attempt(**told | {name: when(told.get(name)) for name in ("started_at", "ended_at")})


def task_record(fields: Mapping[str, str], position: int | None, eta_seconds: float | None) -> TaskRecord:
    written = (fields.get(f"attempt:{fence}") for fence in range(1, int(fields["fence"]) + 1))
    attempts = [attempt(text) for text in written if text]
    return TaskRecord(
        task_id=fields["id"],
        tenant=fields["tenant"],
        status=TaskStatus(fields["status"]),
        request=ResolvedRequest.model_validate_json(fields["request"]),
        request_id=fields["request_id"],
        retry_of=fields.get("retry_of"),
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
        deliveries=deliveries(fields),
        created_at=datetime.fromtimestamp(int(fields["created_at"]) / 1000, UTC),
        started_at=when(fields.get("started_at")),
        finished_at=when(fields.get("finished_at")),
        expires_at=when(fields.get("expires_at")),
    )


SUMMARY = ("status", "model", "created_at", "finished_at", "tenant", "request", "n", "images", "retry_of", "error")
PROMPT_CHARS = 120  # of a prompt, in a list


def task_summary(task_id: str, fields: Sequence[str | None]) -> TaskSummary:
    """Return a line of a list of tasks from the SUMMARY of a record."""
    status, model, created_at, finished_at, tenant, request, n, images, retry_of, error = fields
    pictures = len(json.loads(images or "[]"))
    return TaskSummary(
        task_id=task_id,
        tenant=tenant or "",
        status=TaskStatus(status or ""),
        model=model or "",
        prompt=str(json.loads(request or "{}").get("prompt", ""))[:PROMPT_CHARS],
        n=int(n or 1),
        images=pictures,
        thumbnail_url=f"/api/tasks/{task_id}/thumbnail" if pictures else None,
        retry_of=retry_of,
        error_code=TaskError.model_validate_json(error).code if error else None,
        created_at=datetime.fromtimestamp(int(created_at or 0) / 1000, UTC),
        finished_at=when(finished_at),
    )


def queue_parts(name: str) -> tuple[str, Priority, str] | None:
    """Return a queue's model, priority and tenant; None of webhooks, or somebody else's RQ queue in the same Redis."""
    model, priority, tenant = [*name.split(".", 2), "", ""][:3]
    known = next((one for one in PRIORITIES if one == priority), None)
    return (model, known, tenant) if known and tenant else None


def queue_depth(name: str, queued: int, running: int, created_at: str | None, now_ms: int) -> QueueDepth | None:
    parts = queue_parts(name)
    if parts is None:
        return None
    model, priority, tenant = parts
    return QueueDepth(
        name=name,
        model=model,
        priority=priority,
        tenant=tenant,
        queued=queued,
        running=running,
        oldest_age_seconds=(now_ms - int(created_at)) / 1000 if created_at else None,
    )


def worker_card(text: str, drained: Collection[str] = ()) -> WorkerCard | None:
    """Return a worker's card, or None where another version of zfleet wrote one that this version cannot read.

    `drained` are the slots that claim nothing.
    """
    try:
        card = WorkerCard.model_validate_json(text)
    except ValidationError:
        return None
    return card.model_copy(update={"drained": slot_of(card.name) in drained})


def refusal(reply: Sequence[Any], task: NewTask, queue: str) -> FleetError | None:
    """Return why a submit was refused, by its reply; None when it was not."""
    back = "come back after Retry-After seconds"
    match reply:
        case ["conflict", known]:
            return IdempotencyConflict(f"this Idempotency-Key already made task {known} from another body")
        case ["full", "queue", count]:
            return QueueFull(f"queue {queue} holds {count} tasks, its cap; {back}, or have ZFLEET_QUEUE_CAP raised")
        case ["full", _, count]:
            return QueueFull(f"the fleet holds {count} tasks, its cap; {back}, or have ZFLEET_FLEET_CAP raised")
        case ["quota", count, turn_ms]:
            message = f"{count} tasks of this API key wait, of {task.max_queued} at most; {back}, or cancel one"
            turn_s = seconds(turn_ms)
            return QuotaUsedUp(message) if turn_s is None else QuotaUsedUp(message, turn_s)
        case ["late", eta_ms]:
            eta_s, deadline_s = eta_ms / 1000, task.request.deadline_s or 0.0
            message = f"by the estimate the task would end in {eta_s:.1f} s, after its deadline_s of {deadline_s:g}"
            return TooLate(f"{message}; give it more time, or {back}", eta_s - deadline_s)
    return None


def eta_errors(fields: Mapping[str, str]) -> dict[str, EtaErrors]:
    """Return each model's histogram, from fields <model>:<bound> and <model>:sum."""
    counts: dict[str, dict[str, int]] = {}
    for field, value in fields.items():
        model, _, bound = field.rpartition(":")
        if bound != "sum":
            counts.setdefault(model, {})[bound] = int(value)
    found = {}
    for model, own in counts.items():
        totals = accumulate(own.get(bound, 0) for bound in ETA_ERROR_BOUNDS)
        found[model] = EtaErrors(list(zip(ETA_ERROR_BOUNDS, totals, strict=True)), float(fields[f"{model}:sum"]))
    return found


def seconds(milliseconds: int | str) -> float | None:
    """Return a script's estimate in seconds; '' is none."""
    return None if milliseconds == "" else int(milliseconds) / 1000
