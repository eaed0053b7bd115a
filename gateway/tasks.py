"""The native task, as every dialect sees it: submit, find, wait, cancel, list, follow. Speaks of no HTTP."""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from types import MappingProxyType

from common import inputs, tracing
from common.broker import Broker
from common.errors import (
    AlreadyFinal,
    FleetError,
    IdempotencyConflict,
    InvalidRequest,
    QueueFull,
    QuotaUsedUp,
    RedisUnavailable,
    StorageFull,
    TaskExpired,
    TooLate,
    UnknownTask,
)
from common.models import Catalogue
from common.records import NewTask, Submitted
from common.schemas import GenerateRequest, Progress, TaskRecord, TaskStatus, TaskSummary
from gateway import places, submission
from gateway.admission import Caller
from gateway.diskguard import DiskGuard
from gateway.inputs import Inputs
from gateway.places import Place
from gateway.templates import Templates
from gateway.waiting import FRESH_S, Hub, Listener, Signal
from gateway.webhooks.targets import Targets

READS_AT_ONCE = 32  # when thousands wake together, so that they do not use up the connections to Redis
READ_TURN_S = 30.0  # the longest that one of them stands in line for that
SILENCE_S = 15.0  # a follower hears something at least this often
NO_SUCH_TASK = "no task has this id"
AGAIN_S = 1.0  # after which one who could not read the task looks again

_TASK_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """A task that stands in line, or one that the same Idempotency-Key made earlier."""

    task_id: str
    status: TaskStatus
    position: int | None
    eta_seconds: float | None


class Tasks:
    """One process's tasks. Every method raises RedisUnavailable when Redis stays away."""

    def __init__(
        self,
        broker: Broker,
        catalogue: Catalogue,
        disk: DiskGuard,
        pictures: Inputs,
        templates: Templates,
        targets: Targets = Targets(),  # noqa: B008 - never changed
    ) -> None:
        self._targets = targets
        self._broker = broker
        self._catalogue = catalogue
        self._disk = disk
        self._pictures = pictures
        self._templates = templates
        self._hub = Hub(broker.events)
        self._turns = threading.BoundedSemaphore(READS_AT_ONCE)

    def submit(
        self,
        request: GenerateRequest,
        caller: Caller,
        *,
        request_id: str = "",
        idempotency_key: str = "",
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Accepted:
        """Accept a request; `files` are those of its pictures that stand in it under a name.

        What an Idempotency-Key has made once is found again, even where the same would be refused by now. Raises
        InvalidRequest, UnknownModel, QueueFull, QuotaUsedUp, TooLate, StorageFull, StorageError, IdempotencyConflict,
        and TaskExpired for a task made earlier whose result is past its retention.
        """
        traceparent = tracing.carried()
        asked, (request, wrong) = request, self._templates.fill(request)
        spec = submission.check(request, self._catalogue, caller.priority_max, wrong)
        if request.webhook:
            self._targets.check(request.webhook.url)
        pictures = self._pictures.look(inputs.named(request), files, caller.tenant)
        refusal: FleetError | None = StorageFull(full) if (full := self._disk.reason()) else None
        resolve = partial(submission.resolve, request, spec, pictures, priority_max=caller.priority_max)
        try:
            resolved = resolve(live=self._broker.limits(spec.name))
        except InvalidRequest as error:
            if not idempotency_key:
                raise
            resolved, refusal = resolve(), error  # the workers may have changed since it was accepted
        if refusal is None:
            self._pictures.keep(pictures)
        task = NewTask(
            task_id=submission.new_task_id(),
            tenant=caller.tenant,
            key_id=caller.key_id,
            max_queued=caller.key.max_queued if caller.key else None,
            reject_if_late=request.reject_if_late,
            request=resolved,
            request_id=request_id,
            traceparent=traceparent,
            idempotency_key=idempotency_key,
            body_hash=submission.body_hash(asked, pictures) if idempotency_key else "",
        )
        done = self.stand_in_line(task, pictures, refusal)
        if done.created:
            return Accepted(
                task_id=done.task_id, status=TaskStatus.QUEUED, position=done.position, eta_seconds=done.eta_seconds
            )
        return self.accepted(done.task_id, caller)

    def accepted(self, task_id: str, caller: Caller) -> Accepted:
        """Return a task that was made earlier as it now is; raises UnknownTask and TaskExpired."""
        record = self.find(task_id, caller)
        return Accepted(
            task_id=record.task_id, status=record.status, position=record.position, eta_seconds=record.eta_seconds
        )

    def stand_in_line(self, task: NewTask, pictures: submission.Pictures, refusal: FleetError | None) -> Submitted:
        """Return what became of a task; with a `refusal` it may only be one that was accepted before."""
        try:
            done = self._broker.submit(task, closed=refusal is not None)
        except (QueueFull, QuotaUsedUp, TooLate, IdempotencyConflict) as error:
            self._pictures.drop(pictures)
            if refusal is not None and isinstance(error, QueueFull):
                raise refusal from None
            raise
        if done.task_id != task.task_id:  # not the same submit, whose first reply was lost
            self._pictures.drop(pictures)
        return done

    def find(self, task_id: str, caller: Caller) -> TaskRecord:
        """Return a task; raises UnknownTask, and TaskExpired when its result is past its retention."""
        return self._shown(self._view(task_id), caller)

    def _view(self, task_id: str) -> TaskRecord | None:
        return self._broker.view(task_id) if _TASK_ID.fullmatch(task_id) else None

    def _shown(self, record: TaskRecord | None, caller: Caller) -> TaskRecord:
        if record is None or not caller.may_see(record.tenant):
            raise UnknownTask(NO_SUCH_TASK)
        if record.expires_at is not None and record.expires_at <= datetime.now(UTC):
            raise TaskExpired(f"the task's result was kept until {record.expires_at:%Y-%m-%dT%H:%M:%SZ}")
        return record

    def wait(self, task_id: str, seconds: float, caller: Caller) -> TaskRecord:
        """Return the task as soon as it is final, and after so many seconds as it then is."""
        if seconds <= 0:
            return self.find(task_id, caller)
        until = time.monotonic() + seconds
        with self._hub.listen(task_id) as listener:
            record = self._look(task_id, caller, listener)
            while not record.status.final and not self._hub.closed and (left := until - time.monotonic()) > 0:
                heard = listener.wait(min(left, self._hub.safety_net_s()))
                if turn_s := self._hub.turn_s(listener, heard):
                    listener.wait(min(max(0.0, until - time.monotonic()), turn_s))
                record = self._look(task_id, caller, listener)
        return record

    def follow(self, task_id: str, caller: Caller, told: Place | None = None) -> Iterator[TaskRecord | Progress | None]:
        """Yield the task now and at each change, its steps in between, and None in times of silence.

        With `told`, the place up to which somebody has been told, only what is new since; None first if nothing is, and
        nothing at all to whoever has seen the end. Changes are never left out; steps come in order, and are left out
        for a slow reader, and where so many follow that telling each would slow down others. A step brings a preview
        only where there is a newer one than this has yielded. Ends with the final task, or when this process stops.
        Raises UnknownTask and TaskExpired only at the start.
        """
        with self._hub.listen(task_id, every_step=True) as listener:
            record = self._look(task_id, caller, listener)
            new = list(places.news(record, told))
            yield from new
            if not new and not record.status.final:
                yield None
            place = Place.of(record) if new or told is None else told
            sure_until = time.monotonic() + self._hub.safety_net_s()
            while not record.status.final and not self._hub.closed:
                longest = SILENCE_S * random.uniform(0.5, 1.0)  # those who came together need not speak together
                heard = listener.wait(min(longest, max(AGAIN_S, sure_until - time.monotonic())))
                try:
                    if heard == "progress" and sure_until and record.status is TaskStatus.RUNNING:
                        record = self._stepped(record, listener)
                    elif heard != "timeout" or time.monotonic() >= sure_until:
                        record, sure_until = self._look_again(task_id, caller, listener, heard)
                except RedisUnavailable:  # the stream outlives it, and trusts no step before it has looked again
                    sure_until = 0.0
                except UnknownTask:  # Redis came back without it; whoever follows again is told so
                    return
                new = list(places.news(record, place))
                yield from new
                if new:
                    place = Place.of(record)
                elif heard == "timeout":
                    yield None
                if new and not record.status.final:
                    listener.rest(self._hub.step_gap_s())

    def _stepped(self, record: TaskRecord, listener: Listener) -> TaskRecord:
        """Return a running task after the step that was heard of."""
        changes: dict[str, object] = {"step": listener.step}
        if record.request.preview:
            changes["preview"] = listener.topic.look("preview", lambda: self._broker.preview(record.task_id))
        return record.model_copy(update=changes)

    def _look(self, task_id: str, caller: Caller, listener: Listener, fresh_s: float = FRESH_S) -> TaskRecord:
        def read() -> TaskRecord | None:
            with self._turn():
                return self._view(task_id)

        return self._shown(listener.topic.look("record", read, fresh_s=fresh_s), caller)

    def _look_again(self, task_id: str, caller: Caller, listener: Listener, heard: Signal) -> tuple[TaskRecord, float]:
        """Return a task that is followed, and until when silence about it is to be trusted."""
        if turn_s := self._hub.turn_s(listener, heard):
            listener.wait(turn_s)
        silence_s = self._hub.safety_net_s()
        record = self._look(task_id, caller, listener, silence_s / 2 if heard == "timeout" else FRESH_S)
        return record, time.monotonic() + silence_s

    def cancel(self, task_id: str, caller: Caller) -> TaskRecord:
        """Cancel a task and return it as it then is; raises UnknownTask, TaskExpired, AlreadyFinal."""
        outcome = self._broker.cancel(task_id, caller.reach) if _TASK_ID.fullmatch(task_id) else "unknown"
        self._hub.changed(task_id)
        record = self.find(task_id, caller)
        if outcome == "final":
            raise AlreadyFinal(f"the task is {record.status} already, and stays so")
        return record

    @property
    def closed(self) -> bool:
        """Whether this process stops, so that nobody is to wait here any more."""
        return self._hub.closed

    def page(
        self,
        tenant: str,
        *,
        status: TaskStatus | None,
        model: str | None = None,
        limit: int,
        before: tuple[int, str] | None,
    ) -> tuple[list[TaskSummary], tuple[int, str] | None]:
        """Return a tenant's tasks (EVERYBODY: all), newest first, and where the next page begins (None at the end)."""
        return self._broker.tasks(tenant, status=status, model=model, limit=limit, before=before)

    def close(self) -> None:
        """Let everybody who waits be answered now. For a process that stops."""
        self._hub.close()

    @property
    def hub(self) -> Hub:
        """What this process hears of all tasks."""
        return self._hub

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._turns.acquire(timeout=READ_TURN_S):
            raise RedisUnavailable("too many waiters want to be answered at once; ask again")
        try:
            yield
        finally:
            self._turns.release()
