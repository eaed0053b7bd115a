"""What failed, cleared up by an operator: done over, or removed with all it left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from flask import Response
from pydantic import Field, field_validator

from common import telemetry
from common.apikeys import Tenant
from common.broker import Broker
from common.errors import (
    FleetError,
    Forbidden,
    InvalidRequest,
    MalformedBody,
    NotStored,
    QueueFull,
    RedisUnavailable,
    StorageError,
    StorageFull,
    UnsupportedMediaType,
)
from common.failed import Place, place
from common.schemas import Wire
from common.storage.base import BaseStorage, attempt_folder
from gateway import problems, requestlog
from gateway.admission import caller, open_to
from gateway.api import NO_STORE, Api, json_answer
from gateway.retries import Retries
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from common.failed import FailedTask, Purged

BATCH = 100
BATCH_MAX = 200
LOOKED_MAX = 5_000  # tasks that one call looks at, most of which may have been done over before
NOT_NOW = (QueueFull, StorageError, RedisUnavailable)  # of which the next task would hear as well

log = telemetry.get_logger()


class Batch(Wire):
    """Which of the tasks that failed or expired, and how many of them at a time."""

    model: str | None = Field(default=None, max_length=32, description="Only of this model.")
    tenant: Tenant | None = Field(default=None, description="Only of this tenant.")
    limit: int = Field(default=BATCH, ge=1, le=BATCH_MAX, strict=True)


class RequeueBatch(Batch):
    """Which of them are done over, going on where another call has left off."""

    cursor: str | None = Field(default=None, description="The `next_cursor` of the answer before.")

    @field_validator("cursor")
    @classmethod
    def _cursor_was_given(cls, cursor: str | None) -> str | None:
        return cursor and str(place(cursor))


class Requeued(Wire):
    """A task that is done over."""

    task_id: str
    new_task_id: str


class Refused(Wire):
    """A task that cannot be done over, and why."""

    task_id: str
    code: str
    detail: str


class RequeueAnswer(Wire):
    """What was done over, what cannot be, and where the next call goes on; null: there is no more."""

    requeued: Sequence[Requeued]
    refused: Sequence[Refused]
    more: bool
    next_cursor: str | None


class PurgeAnswer(Wire):
    """How many are gone, and whether the same call would find more."""

    purged: int
    more: bool


class Clearing:
    """Does over and removes what failed."""

    def __init__(self, broker: Broker, tasks: Tasks, retries: Retries, storage: BaseStorage) -> None:
        self._broker = broker
        self._tasks = tasks
        self._retries = retries
        self._storage = storage

    def requeue(self, batch: RequeueBatch, request_id: str) -> RequeueAnswer:
        """Take up to so many tasks that have not been done over yet; those that cannot be are told, and passed over.

        Raises QueueFull, StorageFull and RedisUnavailable only if nothing was done before.
        """
        at = place(batch.cursor) if batch.cursor else None
        until_ms = at.until_ms if at else self._broker.clock_ms()
        found = self._broker.failed(model=batch.model, tenant=batch.tenant, after=at)
        requeued: list[Requeued] = []
        refused: list[Refused] = []
        more = False
        try:
            for looked, failed in enumerate(task for task in found if task.known):
                if more := looked == LOOKED_MAX or len(requeued) + len(refused) == batch.limit:
                    break
                if not failed.retried:
                    self._again(failed, request_id, requeued, refused)
                at = Place(until_ms, failed.queue, failed.task_id)
        except NOT_NOW:
            if not requeued:
                raise
            more = True
        return RequeueAnswer(
            requeued=requeued, refused=refused, more=more, next_cursor=str(at) if more and at else None
        )

    def purge(self, batch: Batch, request_id: str) -> PurgeAnswer:
        """Remove up to so many tasks with their records and pictures; raises RedisUnavailable."""
        found = list(islice(self._broker.failed(model=batch.model, tenant=batch.tenant), batch.limit + 1))
        doomed = found[: batch.limit]
        if doomed:
            for purged in self._broker.purge(doomed):
                self._tasks.hub.changed(purged.task_id)
                self._sweep(purged, request_id)
        return PurgeAnswer(purged=len(doomed), more=len(found) > batch.limit)

    def _again(self, failed: FailedTask, request_id: str, requeued: list[Requeued], refused: list[Refused]) -> None:
        """Do a task over, if it is still there, and note how it went; raises NOT_NOW."""
        try:
            if record := self._broker.view(failed.task_id):
                again = self._retries.again(record, key_id=failed.key_id, request_id=request_id)
                requeued.append(Requeued(task_id=failed.task_id, new_task_id=again.task_id))
        except FleetError as error:
            if isinstance(error, NOT_NOW) and not isinstance(error, NotStored):
                raise
            refused.append(Refused(task_id=failed.task_id, code=error.code, detail=error.message))

    def _sweep(self, purged: Purged, request_id: str) -> None:
        """Remove what a task left in storage; housekeeping finds what cannot be removed now."""
        try:
            for key in purged.images:
                self._storage.delete(key)
            for fence, attempt in purged.attempts.items():
                for day in {attempt.started_at.date(), (attempt.ended_at or attempt.started_at).date()}:
                    self._storage.remove(attempt_folder(attempt.worker, purged.task_id, fence, day))
        except StorageError as error:
            log.warning("pictures_not_removed", task_id=purged.task_id, request_id=request_id, code=error.code)


def create(clearing: Clearing) -> Api:
    """Return the routes that clear up what failed."""
    api = Api("failed", __name__, about="Clear up what failed.")
    body = (InvalidRequest, MalformedBody, UnsupportedMediaType, Forbidden, RedisUnavailable)
    refusals = problems.documented(*body, QueueFull, StorageFull, StorageError)

    @api.post("/api/failed/requeue", responses={"200": RequeueAnswer, **refusals})
    @open_to("admin")
    def requeue(body: RequeueBatch) -> Response:
        """Do over tasks that failed or expired, each once: new tasks for their tenants, as by a retry.

        They count against no rate and no `max_queued`. Call it again with `next_cursor` until that is null.
        """
        answer = clearing.requeue(body, requestlog.current_id())
        log.warning("failed_requeued", count=len(answer.requeued), by=caller().key_id)
        return json_answer(answer, headers=NO_STORE)

    @api.post("/api/failed/purge", responses={"200": PurgeAnswer, **problems.documented(*body)})
    @open_to("admin")
    def purge(body: Batch) -> Response:
        """Remove tasks that failed or expired, with their records and pictures: they are unknown afterwards.

        Call it again while there are `more`.
        """
        answer = clearing.purge(body, requestlog.current_id())
        log.warning("failed_purged", count=answer.purged, by=caller().key_id)
        return json_answer(answer, headers=NO_STORE)

    return api
