"""What becomes of a task, for calls that answer with its pictures: the finished task, or an error that says why not."""

from __future__ import annotations

import time

from common.errors import (
    DeadlineExceeded,
    FieldError,
    RedisUnavailable,
    TaskCanceled,
    TaskFailed,
    TaskUnfinished,
)
from common.schemas import TaskRecord, TaskStatus
from gateway.admission import Caller
from gateway.tasks import Tasks

SLICE_S = 30.0
PAUSE_S = 1.0


def wait_for(tasks: Tasks, task_id: str, caller: Caller, seconds: float) -> TaskRecord:
    """Return the task once it has succeeded; raises what `check` does, TaskUnfinished after so many seconds.

    The task is the client's already, so a Redis that is away meanwhile is waited for, too: an error would make the
    client ask for another picture.
    """
    until = time.monotonic() + seconds
    while True:
        left = until - time.monotonic()
        try:
            record = tasks.wait(task_id, min(left, SLICE_S), caller)
        except RedisUnavailable:
            if left <= 0:
                raise unfinished(task_id) from None
            time.sleep(min(left, PAUSE_S))
            continue
        if record.status.final:
            return check(record)
        if tasks.closed or left <= 0:
            raise unfinished(task_id)


def check(record: TaskRecord) -> TaskRecord:
    """Return a final task that has succeeded; raises TaskFailed, TaskCanceled or DeadlineExceeded for any other."""
    task_id, error = record.task_id, record.error
    if record.status is TaskStatus.SUCCEEDED:
        return record
    if record.status is TaskStatus.CANCELED:
        raise TaskCanceled(f"task {task_id} was canceled")
    if record.status is TaskStatus.EXPIRED or (
        error and error.code == DeadlineExceeded.code and record.request.deadline_s
    ):
        told = f"passed before task {task_id} had ended; allow it more"
        raise DeadlineExceeded(f"deadline_s: {told}", errors=[FieldError("deadline_s", told)])
    raise TaskFailed(f"task {task_id} failed" + (f": {error.code}: {error.message}" if error else ""))


def unfinished(task_id: str) -> TaskUnfinished:
    """Return the error of a call that cannot wait any longer."""
    return TaskUnfinished(
        f"task {task_id} goes on, but this call cannot wait any longer: GET /api/status/{task_id}?wait=60, or send it "
        "again with the Idempotency-Key that it had"
    )
