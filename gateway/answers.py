"""The native answer to a task that was accepted, by a submit or by a retry."""

from __future__ import annotations

from flask import Response

from common.schemas import SubmitAnswer
from gateway import requestlog
from gateway.api import NO_STORE, json_answer
from gateway.tasks import Accepted


def accepted(task: Accepted) -> Response:
    """Return 202 with where to follow the task, which this request's line in the log names."""
    requestlog.about(task.task_id)
    answer = SubmitAnswer(
        task_id=task.task_id,
        status=task.status,
        status_url=f"/api/status/{task.task_id}",
        events_url=f"/api/tasks/{task.task_id}/events",
        cancel_url=f"/api/cancel/{task.task_id}",
        position=task.position,
        eta_seconds=task.eta_seconds,
    )
    return json_answer(answer, 202, {"Location": answer.status_url, **NO_STORE})
