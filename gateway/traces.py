"""The span of a request that makes a task: the root of the task's trace, or a child of the client's own span."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from common import tracing

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from common.spans import Span


def begin(environ: WSGIEnvironment) -> Span | None:
    """Begin a span for a request that may make a task; None for others, and where nothing is traced."""
    spans = tracing.spans()
    if spans is None or environ["REQUEST_METHOD"] != "POST":
        return None
    from common.spans import SERVER

    span = spans.start("POST", environ.get("HTTP_TRACEPARENT", ""), kind=SERVER)
    tracing.serve(span)
    return span


def end(span: Span, request_id: str, line: Mapping[str, object]) -> None:
    """End it; `line` is what the log says of the request. One that asked for no task is not sent."""
    tracing.serve(None)
    if not span.carried:
        return
    status, route = line["status"], str(line.get("route") or "")
    attributes: dict[str, str | int] = {"http.request.method": "POST", "zfleet.request_id": request_id}
    if route:
        attributes["http.route"] = route
    if isinstance(task_id := line.get("task_id"), str):
        attributes["zfleet.task_id"] = task_id
    if isinstance(status, int):
        attributes["http.response.status_code"] = status
    failed = not isinstance(status, int) or status // 100 == 5  # what a client did wrong is no error of a server's span
    span.end(name=f"POST {route}".strip(), error=str(status) if failed else "", attributes=attributes)
