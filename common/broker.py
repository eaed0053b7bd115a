"""The task's life on Redis: submit, claim, beat, progress, finish, release, cancel and reap. Views are FleetView's,
API keys are Keyring's, operators' orders Operating's, rates RateLimits', what webhooks are told is Outbox's, and what
is counted is Figures'.

Every transition is one Lua script of `lua/`: atomic, and safe to send twice. All methods raise RedisUnavailable when
Redis stays away longer than the broker's patience.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from pydantic import ValidationError

from common import keys
from common.cards import WorkerCard
from common.connection import hear
from common.errors import RedisUnavailable
from common.figures import Figures
from common.fleetview import FleetView
from common.keyring import Keyring
from common.link import BELL_WAIT_S
from common.operating import Operating
from common.outbox import Outbox
from common.ratelimit import RateLimits
from common.records import (
    Beaten,
    Claim,
    Hold,
    Moved,
    NewTask,
    Reaped,
    Submitted,
    Verdict,
    claimed,
    refusal,
    seconds,
)
from common.schemas import ImageRef, StageTimings, TaskError
from common.serverfacts import ServerFacts

NOTHING: Mapping[Hold, str] = {}
NO_LIMIT: Mapping[str, int] = {}
REAP_BATCH = 100
REAP_GAP_S = 3.0  # some supervisor looks every second; a gap this long was an outage
RECONCILE_GRACE_S = 5.0
LONGEST_BOUND_S = 1e9  # a script cannot read infinity


class Broker(FleetView, ServerFacts, Keyring, Operating, RateLimits, Outbox, Figures):
    """One process's way to Redis. Safe to share between threads and greenlets."""

    # The gateway's side

    def submit(self, task: NewTask, *, closed: bool = False) -> Submitted:
        """Accept a task, once per id and per Idempotency-Key; what was accepted before is found, and never refused.

        With `closed` nothing new is accepted. Raises QueueFull, QuotaUsedUp, TooLate, IdempotencyConflict.
        """
        request = task.request
        queue = keys.queue_name(request.model, request.priority, task.tenant)
        idempotency = hashlib.sha256(task.idempotency_key.encode()).hexdigest() if task.idempotency_key else ""
        record = {
            "tenant": task.tenant,
            "key": task.key_id,
            "model": request.model,
            "priority": request.priority,
            "queue": queue,
            "cost": task.cost,
            "n": request.n,
            "steps": request.steps,
            "pixels": request.width * request.height,
            "request_id": task.request_id,
            "traceparent": task.traceparent,
            "deadline_ms": math.ceil(request.deadline_s * 1000) if request.deadline_s else 0,
            "idempotency": idempotency,
            "body_hash": task.body_hash,
            "webhook": ",".join(request.webhook.events) if request.webhook else "",
            "retry_of": task.retry_of,
        }
        job = json.dumps(["zfleet.task", None, [task.task_id], {}])
        bounds = {
            "queue_cap": 0 if closed else self._settings.queue_cap,
            "fleet_cap": self._settings.fleet_cap,
            "max_queued": task.max_queued,
            "in_time": task.reject_if_late and bool(request.deadline_s),
            "slots": self._slots(),
        }
        reply = self._run(
            "submit", task.task_id, json.dumps(record), request.model_dump_json(), job, json.dumps(bounds),
            self._retention_ms,
        )  # fmt: skip
        if refused := refusal(reply, task, queue):
            raise refused
        return Submitted(reply[1], reply[0] == "created", reply[2], seconds(reply[3]))

    def cancel(self, task_id: str, tenant: str | None) -> Literal["canceled", "flagged", "final", "unknown"]:
        """Cancel a task of this tenant (None: of any): a queued one is gone at once, a running one is flagged and stops
        at its next step.
        """
        outcome: Literal["canceled", "flagged", "final", "unknown"] = self._run(
            "cancel", task_id, tenant or "", self._retention_ms, secrets.token_hex(8)
        )
        return outcome

    # The worker's side

    def claim(
        self,
        worker: str,
        gpu: str,
        models: Sequence[str],
        room: int,
        *,
        resident: Collection[str] | None = None,
        bound_s: float = math.inf,
        busy: bool = False,
        largest: Mapping[str, int] = NO_LIMIT,
        give_up: Callable[[], bool] | None = None,
    ) -> Claim:
        """Take tasks of these models until `room` pictures are reached.

        Among tasks of equal priority those whose model is `resident` (None: all are) go first, unless another's has
        waited for `bound_s`; a worker that is `busy` takes no other ones before. Of a model in `largest` it takes
        pictures of so many pixels at most. A reply that got lost is asked for
        again, not claimed anew; so a worker should rather be patient than call twice. A task whose record cannot be
        read fails alone.
        """
        token = secrets.token_hex(8)
        lease_ms = int(self._settings.lease_s * 1000)
        there = [model for model in models if resident is None or model in resident]
        order = there + [model for model in models if model not in there]
        reply = self._run(
            "claim", worker, gpu, token, room, lease_ms, self._retention_ms, min(bound_s, LONGEST_BOUND_S) * 1000,
            self._settings.ageing_s * 1000, int(busy), len(there),
            *(part for model in order for part in (model, largest.get(model, ""))),
            give_up=give_up,
        )  # fmt: skip
        tasks = []
        for row in reply[2:]:
            try:
                tasks.append(claimed(row))
            except ValidationError:
                error = TaskError(code="unreadable_record", message="this worker cannot read the task's record")
                with contextlib.suppress(RedisUnavailable):  # its lease runs out; the others of this claim are here
                    self.finish(worker, Hold(row[0], row[1]), "failed", error=error)
        return Claim(tasks, reply[0] == "suspended", reply[1])

    def wait(self, models: Sequence[str], timeout_s: float = BELL_WAIT_S) -> bool:
        """Block until the bell rings for one of these models, a second at most; return whether it rang.

        Unlike the other calls this one does not retry: it raises RedisUnavailable at once.
        """
        return hear(self._bell, [keys.BELL + model for model in models], timeout_s)

    def beat(self, card: WorkerCard, holds: Sequence[Hold], rq_ttl_s: int) -> Beaten:
        """Renew the leases of `holds`; return a verdict for each, and what else the worker should know."""
        ttl_ms = int(self._settings.beat_s * keys.CARD_BEATS * 1000)
        state = "busy" if holds else "idle"
        flat = [part for hold in holds for part in hold]
        lease_ms = int(self._settings.lease_s * 1000)
        reply = self._run("beat", card.name, lease_ms, card.model_dump_json(), ttl_ms, rq_ttl_s, state, *flat)
        return Beaten(bool(reply[0]), reply[2:], bool(reply[1]))

    def progress(
        self, worker: str, steps: Mapping[Hold, tuple[int, int]], previews: Mapping[Hold, str] = NOTHING
    ) -> list[Verdict]:
        """Note for each hold how many of its steps are done, and its preview; return a verdict for each."""
        flat = [part for hold, (step, total) in steps.items() for part in (*hold, step, total, previews.get(hold, ""))]
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
        picture_ms: float | None = None,
        fuse: str = "",
        give_up: Callable[[], bool] | None = None,
    ) -> Literal["ok", "already", "lost"]:
        """End a run; the first writer wins. `lost`: another attempt has the task by now, and this result is void.

        `busy_ms` is how long it was at work, `picture_ms` how long one of its pictures took (None: all of that), `fuse`
        the limit that stopped it, if one did.
        """
        outcome: Literal["ok", "already", "lost"] = self._run(
            "finish", *hold, status, json.dumps([image.model_dump() for image in images]),
            error.model_dump_json() if error else "", json.dumps(list(warnings), ensure_ascii=False),
            (stages or StageTimings()).model_dump_json(), f"{busy_ms:.3f}", self._retention_ms, worker,
            f"{busy_ms if picture_ms is None else picture_ms:.3f}", fuse, give_up=give_up,
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

    def reap(
        self, worker: str = "", suspects: Sequence[str] = (), bystanders: Sequence[str] = (), *, crashed: bool = False
    ) -> list[Reaped]:
        """Take back the runs of a worker known to be dead or, without a name, every run whose lease ran out.

        A crash is counted for the `suspects`; they and the `bystanders` will run alone. Other runs are given back
        unharmed. Of a lease that ran out nobody knows, so every run is a suspect; after an outage none runs out for
        one term more. A worker that `crashed` has died unasked, and counts as that.
        """
        lease_ms, gap_ms = int(self._settings.lease_s * 1000), int(REAP_GAP_S * 1000)
        limits = (self._settings.crash_limit, self._retention_ms, lease_ms, gap_ms, REAP_BATCH)
        reply = self._run("reap", worker, *limits, int(crashed), len(suspects), *suspects, *bystanders)
        return [Reaped(*row) for row in reply]

    def expire(self) -> list[Moved]:
        """End as expired every queued task whose deadline has passed; return what did since somebody last asked."""
        return [Moved(*row) for row in self._run("expire", self._retention_ms, REAP_BATCH)]

    def reconcile(self, every_s: float = 0.0) -> list[Moved]:
        """Put back every open task that stands in no queue and no lease; return these.

        Does nothing if anybody did it less than `every_s` ago: it reads all open tasks, and once is enough for a fleet.
        """
        put_back = self._run("reconcile", int(RECONCILE_GRACE_S * 1000), int(every_s * 1000), self._retention_ms)
        return [Moved(*row) for row in put_back]
