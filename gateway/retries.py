"""A task that came to nothing, done over: a new task with the very same request, seed and pictures to start from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from flask import Response

from common import inputs, tracing
from common.apikeys import ApiKey
from common.broker import Broker
from common.errors import (
    FleetError,
    InputGone,
    InvalidRequest,
    NotRetryable,
    QueueFull,
    QuotaUsedUp,
    RedisUnavailable,
    StorageError,
    StorageFull,
    TaskExpired,
    UnknownModel,
    UnknownTask,
)
from common.models import Catalogue
from common.records import NewTask
from common.schemas import SubmitAnswer, TaskRecord, TaskStatus
from gateway import answers, problems, requestlog, submission
from gateway.admission import Caller, caller, submits
from gateway.api import Api, TaskPath
from gateway.diskguard import DiskGuard
from gateway.inputs import Input, Inputs
from gateway.tasks import Accepted, Tasks
from gateway.webhooks.targets import Targets

ID_CHARS = 32  # as many as any task's id has


class Retries:
    """Makes new tasks of old ones."""

    def __init__(
        self, tasks: Tasks, broker: Broker, catalogue: Catalogue, disk: DiskGuard, pictures: Inputs, targets: Targets
    ) -> None:
        self._tasks = tasks
        self._broker = broker
        self._catalogue = catalogue
        self._disk = disk
        self._pictures = pictures
        self._targets = targets

    def retry(self, task_id: str, caller: Caller, *, request_id: str = "") -> Accepted:
        """Accept a task's request once more, for its tenant, counted against the caller's key; twice is one task.

        Raises UnknownTask, TaskExpired, NotRetryable for one that goes on or has succeeded, InputGone, and what a
        submit does.
        """
        record = self._tasks.find(task_id, caller)
        try:
            return self._tasks.accepted(retry_id(task_id), caller)
        except UnknownTask:
            return self.again(record, key_id=caller.key_id, key=caller.key, request_id=request_id)

    def again(self, record: TaskRecord, *, key_id: str, key: ApiKey | None = None, request_id: str = "") -> Accepted:
        """Accept a task's request once more, as `retry` does, within the limits of `key` and counted under `key_id`."""
        request = record.request
        if not record.status.final or record.status is TaskStatus.SUCCEEDED:
            raise NotRetryable(f"the task is {record.status}; only one that has ended without success is done over")
        highest = key.priority_max if key else "high"
        submission.check_again(request, self._catalogue, self._broker.limits(request.model), highest)
        if request.webhook:
            self._targets.check(request.webhook.url)
        pictures = self._look(record)
        refusal: FleetError | None = StorageFull(full) if (full := self._disk.reason()) else None
        if refusal is None:
            self._pictures.keep(pictures)
        task = NewTask(
            task_id=retry_id(record.task_id),
            tenant=record.tenant,
            key_id=key_id,
            max_queued=key.max_queued if key else None,
            request=request,
            request_id=request_id,
            traceparent=tracing.carried(),
            retry_of=record.task_id,
        )
        done = self._tasks.stand_in_line(task, pictures, refusal)
        return Accepted(
            task_id=done.task_id, status=TaskStatus.QUEUED, position=done.position, eta_seconds=done.eta_seconds
        )

    def _look(self, record: TaskRecord) -> Mapping[str, Sequence[Input]]:
        try:
            return self._pictures.look(inputs.named(record.request), {}, record.tenant)
        except InvalidRequest as error:
            fields = ", ".join(loc for loc, _ in error.errors)
            raise InputGone(f"{fields}: the picture is no longer stored; send it again, and submit anew") from None


def retry_id(task_id: str) -> str:
    """Return the id of the task that does this one over: always the same, and as hard to guess."""
    return hashlib.sha256(f"retry of {task_id}".encode()).hexdigest()[:ID_CHARS]


def create(retries: Retries) -> Api:
    """Return the route that does a task over."""
    api = Api("retries", __name__, about="Tasks done over.")
    refusals = problems.documented(
        UnknownTask, TaskExpired, NotRetryable, InputGone, InvalidRequest, UnknownModel, QueueFull, QuotaUsedUp,
        RedisUnavailable, StorageFull, StorageError,
    )  # fmt: skip

    @api.post("/api/tasks/<task_id>/retry", responses={"202": SubmitAnswer, **refusals})
    @submits
    def retry(path: TaskPath) -> Response:
        """Do a task over that failed, expired or was canceled: a new one with the same request, seed included.

        Sent twice it is one task; its `retry_of` names the old one. It counts against the caller's key.
        """
        accepted = retries.retry(path.task_id, caller(), request_id=requestlog.current_id())
        return answers.accepted(accepted)

    return api
