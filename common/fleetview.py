"""What can be seen of the fleet and its tasks on Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from common import keys
from common.cards import QueueDepth, WorkerCard
from common.connection import messages
from common.fleet import RUN, Run, running
from common.limits import Limits, by_model
from common.link import Link
from common.records import (
    SUMMARY,
    EtaErrors,
    Event,
    Traced,
    attempt,
    eta_errors,
    queue_depth,
    seconds,
    task_record,
    task_summary,
    worker_card,
)
from common.schemas import TaskRecord, TaskStatus, TaskSummary

LIMITS_TTL_S = 2.0  # how long it is taken as known what the workers can do
PAGE_READS = 20  # round trips that one page of tasks may cost


class FleetView(Link):
    """The part of the broker that only looks: at tasks, queues, workers and events."""

    _limits: Mapping[str, Limits] = {}
    _limits_until = 0.0

    def view(self, task_id: str) -> TaskRecord | None:
        """Return a task's record, with its place in line while it is queued; None for an unknown id."""
        reply = self._run("view", task_id, self._retention_ms, json.dumps(self._slots()))
        if not reply:
            return None
        fields, position, eta_ms = reply
        record = dict(zip(fields[::2], fields[1::2], strict=True))
        return task_record(record, None if position < 0 else position, seconds(eta_ms))

    def preview(self, task_id: str) -> str | None:
        """Return what a running task is going to show, as base64 of a WebP file; None where nobody has told."""
        found: str | None = self._patiently(lambda: self._redis.hget(keys.TASK + task_id, "preview"))
        return found

    def traced(self, task_id: str, fence: int | None = None) -> Traced | None:
        """Return what the trace of a task tells of this attempt (None: of the next); None where it is not traced."""

        def read(*fields: str) -> list[str | None]:
            found: list[str | None] = self._patiently(lambda: self._redis.hmget(keys.TASK + task_id, *fields))
            return found

        traceparent, request_id, model, created, last = read(
            "traceparent", "request_id", "model", "created_at", "fence"
        )
        if not traceparent:
            return None
        nth = int(last or 0) + 1 if fence is None else fence
        this, before = (attempt(text) if text else None for text in read(f"attempt:{nth}", f"attempt:{nth - 1}"))
        ended = before.ended_at if before else None
        in_line_ms = round(ended.timestamp() * 1000) if ended else int(created or 0)
        return Traced(traceparent, request_id or "", model or "", in_line_ms, this)

    def tasks(
        self,
        tenant: str,
        *,
        status: TaskStatus | None,
        model: str | None = None,
        limit: int,
        before: tuple[int, str] | None,
    ) -> tuple[list[TaskSummary], tuple[int, str] | None]:
        """Return a tenant's tasks (EVERYBODY: all), newest first, and where the next page begins (None at the end).

        `before` is such a place, from an earlier page. A page may be short while there are more: a rare state is not
        searched for without end in one call.
        """
        found: list[str] = []
        chunk = max(limit, 50)
        for _ in range(PAGE_READS):
            rows = self._tasks_before(tenant, before, chunk)
            for task_id, score, (its_status, its_model) in rows:
                before = (score, task_id)
                if its_status is None or (status and its_status != status) or (model and its_model != model):
                    continue
                found.append(task_id)
                if len(found) == limit:
                    return self._summaries(found), before
            if len(rows) < chunk:
                return self._summaries(found), None
        return self._summaries(found), before

    def _summaries(self, task_ids: Sequence[str]) -> list[TaskSummary]:
        rows = zip(task_ids, self._fields_of(task_ids, SUMMARY), strict=True)
        return [task_summary(task_id, fields) for task_id, fields in rows if fields[0] is not None]

    def _fields_of(self, task_ids: Sequence[str], names: Sequence[str]) -> list[list[str | None]]:
        def read() -> list[list[str | None]]:
            pipeline = self._redis.pipeline(transaction=False)
            for task_id in task_ids:
                pipeline.hmget(keys.TASK + task_id, *names)
            found: list[list[str | None]] = pipeline.execute()
            return found

        return self._patiently(read) if task_ids else []

    def _tasks_before(
        self, tenant: str, before: tuple[int, str] | None, count: int
    ) -> list[tuple[str, int, list[str | None]]]:
        key = keys.TENANT_TASKS + tenant
        highest: float | str = before[0] if before else "+inf"

        def read() -> list[tuple[str, int, list[str | None]]]:
            offset = 0
            if before:  # step over what the page before has shown of this very millisecond
                rank = self._redis.zrevrank(key, before[1])
                first = self._redis.zcount(key, f"({before[0]}", "+inf")
                offset = 0 if rank is None else int(rank) + 1 - int(first)
            ids = self._redis.zrevrangebyscore(key, highest, "-inf", start=offset, num=count, withscores=True)
            pipeline = self._redis.pipeline(transaction=False)
            for task_id, _ in ids:
                pipeline.hmget(keys.TASK + task_id, "status", "model")
            return [(i, int(score), fields) for (i, score), fields in zip(ids, pipeline.execute(), strict=True)]

        return self._patiently(read)

    def queues(self) -> list[QueueDepth]:
        """Return every queue with its depth, its running tasks and the age of its oldest one."""

        def read() -> list[QueueDepth]:
            names = sorted(key.removeprefix(keys.RQ_QUEUE) for key in self._redis.smembers(keys.RQ_QUEUES))
            pipeline = self._redis.pipeline(transaction=False)
            for name in names:
                pipeline.llen(keys.RQ_QUEUE + name)
                pipeline.zcard(keys.RQ_STARTED + name)
                pipeline.lindex(keys.RQ_QUEUE + name, 0)
            replies = pipeline.execute()
            for oldest in replies[2::3]:
                pipeline.hget(keys.TASK + (oldest or ""), "created_at")
            ages = pipeline.execute() if names else []
            seconds, micros = self._redis.time()
            rows = zip(names, replies[0::3], replies[1::3], ages, strict=True)
            return [depth for row in rows if (depth := queue_depth(*row, seconds * 1000 + micros // 1000))]

        return self._patiently(read)

    def pending(self) -> int:
        """Return how many tasks are not final yet."""
        return self._patiently(lambda: int(self._redis.zcard(keys.OPEN)))

    def workers(self) -> list[WorkerCard]:
        """Return the card of every live worker, by name."""

        def read() -> list[WorkerCard]:
            names = sorted(self._redis.zrange(keys.WORKERS, 0, -1))
            if not names:
                return []
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.mget([keys.CARD + name for name in names])
            pipeline.smembers(keys.DRAINED)
            cards, drained = pipeline.execute()
            gone = [name for name, card in zip(names, cards, strict=True) if card is None]
            if gone:
                self._redis.zrem(keys.WORKERS, *gone)
            return [card for text in cards if text is not None and (card := worker_card(text, drained))]

        return self._patiently(read)

    def runs(self) -> dict[str, list[Run]]:
        """Return for each worker the tasks it holds and how far they are, those that began first in front.

        By the leases: a worker's card is as old as its last beat.
        """
        ids: list[str] = self._patiently(lambda: self._redis.zrange(keys.LEASES, 0, -1))
        found: dict[str, list[Run]] = {}
        for task_id, (worker, *fields) in zip(ids, self._fields_of(ids, ("worker", *RUN)), strict=True):
            if worker and (run := running(task_id, fields)):
                found.setdefault(worker, []).append(run)
        return {worker: sorted(runs, key=lambda run: run.started_at) for worker, runs in found.items()}

    def limits(self, model: str) -> Limits:
        """Return what the live workers can do with this model, as of the last two seconds."""
        self._look()
        return self._limits.get(model, Limits())

    def events(self, stop: Callable[[], bool], *, ends_only: bool = False) -> Iterator[Event | None]:
        """Yield what happens to any task, until `stop`; None once a (re-)subscription stands, as things may be missed.

        With `ends_only` that is their final states, one each; without, every step as well. One subscription serves a
        whole process. It reconnects for ever.
        """
        channels = (keys.ENDS,) if ends_only else (keys.STEPS, keys.ENDS)
        for text in messages(self._bell, channels, stop):
            if text is None:
                yield None
            else:
                task_id, name, step, steps = text.split(" ")
                yield Event(task_id, name, int(step), int(steps))

    def eta_errors(self) -> dict[str, EtaErrors]:
        """Return for each model how far off the estimates of its finished tasks were."""
        found: dict[str, str] = self._patiently(lambda: self._redis.hgetall(keys.ETA_ERRORS))
        return eta_errors(found)

    # Below the surface

    def _slots(self) -> Mapping[str, tuple[int, int]]:
        """Return how many pictures advance together of each model that is served: in the fleet, and on one worker."""
        self._look()
        return {model: (found.capacity, found.batch) for model, found in self._limits.items() if found.capacity}

    def _look(self) -> None:
        if time.monotonic() >= self._limits_until:
            self._limits_until = time.monotonic() + LIMITS_TTL_S
            self._limits = by_model(self.workers())
