"""The task's life on Redis: submit, claim, beat, progress, finish, release, cancel, reap, and what can be seen of it.

Every transition is one Lua script of `lua/`: atomic, and safe to send twice. All methods raise RedisUnavailable when
Redis stays away longer than the broker's patience.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import redis
from pydantic import ValidationError

from common import keys, scripts
from common.connection import connect, exchange, messages, patiently, run_script, transient
from common.errors import IdempotencyConflict, QueueFull, RedisUnavailable
from common.promises import Promises
from common.records import (
    Claim,
    Event,
    Hold,
    NewTask,
    Reaped,
    Submitted,
    Verdict,
    claimed,
    queue_depth,
    task_record,
    task_summary,
    worker_card,
)
from common.schemas import (
    ImageRef,
    QueueDepth,
    StageTimings,
    TaskError,
    TaskRecord,
    TaskStatus,
    TaskSummary,
    WorkerCard,
)
from common.settings import Settings

T = TypeVar("T")

FOREVER = math.inf
CAPACITY_TTL_S = 2.0  # how long the number of workers a model has is taken as known
REAP_BATCH = 100
REAP_GAP_S = 3.0  # some supervisor looks every second; a gap this long was an outage
BELL_WAIT_S = 1.0  # an idle worker looks up this often; the bell has a longer socket time-out of its own
BELL_POOL_SIZE = 2  # connections that block: the wait for the bell, or one subscription to ends and one to everything
RECONCILE_GRACE_S = 5.0
PAGE_READS = 20  # round trips that one page of tasks may cost


class Broker:
    """One process's way to Redis. Safe to share between threads and greenlets."""

    def __init__(
        self, settings: Settings, *, patience_s: float | None = None, void: Callable[[str, int], None] | None = None
    ) -> None:
        """Connects lazily. `patience_s` is how long a call tries before RedisUnavailable; one that is given `give_up`
        tries for as long as that does not say so. `void` is told of results that are void after all: see Promises.
        """
        self._settings = settings
        self._patience_s = settings.redis_patience_s if patience_s is None else patience_s
        self._timeout_s = settings.redis_timeout_s
        self._promises = Promises(SCRIPTS, void)
        url, heard, bell_s = settings.redis_url, self._promises.connected, BELL_WAIT_S + self._timeout_s
        # Any: redis-py types every reply as possibly bytes or awaitable, which these clients never give
        self._redis: Any = connect(url, timeout_s=self._timeout_s, connected=heard)
        self._bell: Any = connect(url, timeout_s=bell_s, pool_size=BELL_POOL_SIZE, connected=heard)
        self._retention_ms = int(settings.retention_days * 86_400_000)
        self._capacity: dict[str, int] = {}
        self._capacity_until = 0.0

    def close(self) -> None:
        """Close all connections."""
        self._redis.close()
        self._bell.close()

    # The gateway's side

    def submit(self, task: NewTask, *, closed: bool = False) -> Submitted:
        """Accept a task, once per id and per Idempotency-Key; raises QueueFull, IdempotencyConflict.

        With `closed` nothing new is accepted, and only what was accepted before is found.
        """
        request = task.request
        queue = keys.queue_name(request.model, request.priority, task.tenant)
        idempotency = hashlib.sha256(task.idempotency_key.encode()).hexdigest() if task.idempotency_key else ""
        cap = 0 if closed else self._settings.queue_cap
        deadline_ms = math.ceil(request.deadline_s * 1000) if request.deadline_s else 0
        job = json.dumps(["zfleet.task", None, [task.task_id], {}])
        reply = self._run(
            "submit", task.task_id, task.tenant, request.model, request.priority, queue, cap,
            task.cost, self._retention_ms, deadline_ms, request.n, request.steps, request.model_dump_json(),
            task.request_id, job, idempotency, task.body_hash,
        )  # fmt: skip
        if reply[0] == "full":
            raise QueueFull(f"queue {queue} holds {reply[1]} tasks, its cap; try again later")
        if reply[0] == "conflict":
            raise IdempotencyConflict(f"this Idempotency-Key already made task {reply[1]} from another body")
        return Submitted(reply[1], reply[0] == "created", reply[2], self._estimate(request.model, reply[2], reply[3]))

    def view(self, task_id: str) -> TaskRecord | None:
        """Return a task's record, with its place in line while it is queued; None for an unknown id."""
        reply = self._run("view", task_id, self._retention_ms)
        if not reply:
            return None
        fields, position, pace = reply
        record = dict(zip(fields[::2], fields[1::2], strict=True))
        return task_record(record, None if position < 0 else position, self._eta(record, position, pace))

    def cancel(self, task_id: str, tenant: str) -> Literal["canceled", "flagged", "final", "unknown"]:
        """Cancel a task: a queued one is gone at once, a running one is flagged and stops at its next step."""
        outcome: Literal["canceled", "flagged", "final", "unknown"] = self._run(
            "cancel", task_id, tenant, self._retention_ms, secrets.token_hex(8)
        )
        return outcome

    def tasks(
        self, tenant: str, *, status: TaskStatus | None, limit: int, before: tuple[int, str] | None
    ) -> tuple[list[TaskSummary], tuple[int, str] | None]:
        """Return a tenant's tasks, newest first, and where the next page begins (None at the end).

        `before` is such a place, from an earlier page. A page may be short while there are more: a rare state is not
        searched for without end in one call.
        """
        found: list[TaskSummary] = []
        chunk = max(limit, 50)
        for _ in range(PAGE_READS):
            rows = self._tasks_before(tenant, before, chunk)
            for task_id, score, fields in rows:
                before = (score, task_id)
                if fields[0] is None or (status and fields[0] != status):
                    continue
                found.append(task_summary(task_id, fields))
                if len(found) == limit:
                    return found, before
            if len(rows) < chunk:
                return found, None
        return found, before

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
                pipeline.hmget(keys.TASK + task_id, "status", "model", "created_at", "finished_at")
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
            cards = self._redis.mget([keys.CARD + name for name in names])
            gone = [name for name, card in zip(names, cards, strict=True) if card is None]
            if gone:
                self._redis.zrem(keys.WORKERS, *gone)
            return [card for text in cards if text is not None and (card := worker_card(text))]

        return self._patiently(read)

    def capacity(self, model: str) -> int:
        """Return how many runs of this model the fleet can advance together, as of the last two seconds."""
        if time.monotonic() >= self._capacity_until:
            self._capacity_until = time.monotonic() + CAPACITY_TTL_S
            fresh: dict[str, int] = {}
            for card in self.workers():
                for name in card.models:
                    fresh[name] = fresh.get(name, 0) + card.capacity
            self._capacity = fresh
        return self._capacity.get(model, 0)

    def probe(self) -> None:
        """Write to Redis and read it back, or raise RedisUnavailable."""
        self._patiently(lambda: self._redis.set(keys.PROBE, secrets.token_hex(4), ex=keys.PROBE_TTL_S))

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

    # The worker's side

    def claim(
        self,
        worker: str,
        gpu: str,
        models: Sequence[str],
        room: int,
        *,
        give_up: Callable[[], bool] | None = None,
    ) -> Claim:
        """Take tasks of these models until `room` pictures are reached.

        A reply that got lost is asked for again, not claimed anew; so a worker should rather be patient than call
        twice. A task whose record cannot be read fails alone.
        """
        token = secrets.token_hex(8)
        lease_ms = int(self._settings.lease_s * 1000)
        reply = self._run(
            "claim", worker, gpu, token, room, lease_ms, self._retention_ms, *models,
            give_up=give_up,
        )  # fmt: skip
        tasks = []
        for row in reply[1:]:
            try:
                tasks.append(claimed(row))
            except ValidationError:
                error = TaskError(code="unreadable_record", message="this worker cannot read the task's record")
                with contextlib.suppress(RedisUnavailable):  # its lease runs out; the others of this claim are here
                    self.finish(worker, Hold(row[0], row[1]), "failed", error=error)
        return Claim(tasks, reply[0] == "suspended")

    def wait(self, models: Sequence[str]) -> bool:
        """Block until the bell rings for one of these models, a second at most; return whether it rang.

        Unlike the other calls this one does not retry: it raises RedisUnavailable at once, and the caller loops anyway.
        """
        try:
            return self._bell.blpop([keys.BELL + model for model in models], timeout=BELL_WAIT_S) is not None
        except redis.RedisError as error:
            if transient(error):
                raise RedisUnavailable("Redis went away while waiting for work") from error
            raise

    def beat(self, card: WorkerCard, holds: Sequence[Hold], rq_ttl_s: int) -> tuple[bool, list[Verdict]]:
        """Renew the leases of `holds`; return whether RQ still knows the worker, and a verdict for each hold."""
        ttl_ms = int(self._settings.beat_s * keys.CARD_BEATS * 1000)
        state = "busy" if holds else "idle"
        flat = [part for hold in holds for part in hold]
        lease_ms = int(self._settings.lease_s * 1000)
        reply = self._run("beat", card.name, lease_ms, card.model_dump_json(), ttl_ms, rq_ttl_s, state, *flat)
        return bool(reply[0]), reply[1:]

    def progress(self, worker: str, steps: Mapping[Hold, tuple[int, int]]) -> list[Verdict]:
        """Note for each hold how many of its steps are done; return a verdict for each."""
        flat = [part for hold, (step, total) in steps.items() for part in (*hold, step, total)]
        verdicts: list[Verdict] = self._run("progress", worker, *flat)
        return verdicts

    def finish(
        self,
        worker: str,
        hold: Hold,
        status: Literal["succeeded", "failed", "canceled"],
        *,
        images: Sequence[ImageRef] = (),
        error: TaskError | None = None,
        warnings: Sequence[str] = (),
        stages: StageTimings | None = None,
        busy_ms: float = 0.0,
        give_up: Callable[[], bool] | None = None,
    ) -> Literal["ok", "already", "lost"]:
        """End a run; the first writer wins. `lost`: another attempt has the task by now, and this result is void."""
        outcome: Literal["ok", "already", "lost"] = self._run(
            "finish", *hold, status, json.dumps([image.model_dump() for image in images]),
            error.model_dump_json() if error else "", json.dumps(list(warnings), ensure_ascii=False),
            (stages or StageTimings()).model_dump_json(), f"{busy_ms:.3f}", self._retention_ms, worker,
            give_up=give_up,
        )  # fmt: skip
        return outcome

    def release(
        self, worker: str, hold: Hold, *, give_up: Callable[[], bool] | None = None
    ) -> Literal["ok", "canceled", "lost"]:
        """Give a run back to the head of its queue, with no crash counted."""
        outcome: Literal["ok", "canceled", "lost"] = self._run(
            "release", *hold, self._retention_ms, worker, give_up=give_up
        )
        return outcome

    # The supervisor's side

    def reap(self, worker: str = "", suspects: Sequence[str] = (), bystanders: Sequence[str] = ()) -> list[Reaped]:
        """Take back the runs of a worker known to be dead or, without a name, every run whose lease ran out.

        A crash is counted for the `suspects`; they and the `bystanders` will run alone. Other runs are given back
        unharmed. Of a lease that ran out nobody knows, so every run is a suspect; after an outage none runs out for
        one term more.
        """
        lease_ms, gap_ms = int(self._settings.lease_s * 1000), int(REAP_GAP_S * 1000)
        limits = (self._settings.crash_limit, self._retention_ms, lease_ms, gap_ms, REAP_BATCH)
        reply = self._run("reap", worker, *limits, len(suspects), *suspects, *bystanders)
        return [Reaped(*row) for row in reply]

    def expire(self) -> list[str]:
        """End as expired every queued task whose deadline has passed; return their ids."""
        expired: list[str] = self._run("expire", self._retention_ms, REAP_BATCH)
        return expired

    def reconcile(self, every_s: float = 0.0) -> list[str]:
        """Put back every open task that stands in no queue and no lease; return their ids.

        Does nothing if anybody did it less than `every_s` ago: it reads all open tasks, and once is enough for a fleet.
        """
        put_back: list[str] = self._run(
            "reconcile", int(RECONCILE_GRACE_S * 1000), int(every_s * 1000), self._retention_ms
        )
        return put_back

    # Below the surface

    def _run(
        self,
        script: str,
        *args: str | float,
        give_up: Callable[[], bool] | None = None,
    ) -> Any:
        reply, history = self._patiently(lambda: run_script(self._redis, SCRIPTS[script], args), give_up)
        self._promises.heed(script, args, reply, history)
        return reply

    def _patiently(self, call: Callable[[], T], give_up: Callable[[], bool] | None = None) -> T:
        def attempt() -> T:
            self._promises.renew(partial(exchange, self._redis))
            return call()

        patience_s = FOREVER if give_up else self._patience_s
        answer = patiently(
            attempt, patience_s=patience_s, timeout_s=self._timeout_s, give_up=give_up or (lambda: False)
        )
        self._promises.answered()
        return answer

    def _eta(self, record: Mapping[str, str], position: int, pace: str) -> float | None:
        if TaskStatus(record["status"]).final:
            return None
        remaining = 1 - int(record["step"]) / max(1, int(record["steps"]))
        return self._estimate(record["model"], max(position, 0), pace, share=remaining if position < 0 else 1.0)

    def _estimate(self, model: str, position: int, pace: str | None, share: float = 1.0) -> float | None:
        try:
            capacity = self.capacity(model)
        except RedisUnavailable:  # an estimate is not worth failing what has just been done
            return None
        if not pace or not capacity:
            return None
        return round((position // capacity + share) * float(pace) / 1000, 3)


SCRIPTS = scripts.load(keys.lua_table())
