"""What every request gets, whatever becomes of it: an id, a line in the log, and the headers of every answer.

It wraps the application from outside, which is less work for each request than Flask's hooks.
"""

from __future__ import annotations

import functools
import re
import secrets
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flask import Request, request

from common import telemetry
from gateway import traces

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from structlog.typing import FilteringBoundLogger

Answered = Callable[[str | None, str, int | None, float], None]
REQUEST_ID = "zfleet.request_id"  # in the WSGI environment
TASK_ID = "zfleet.task_id"
ROUTE = "zfleet.route"  # the rule, where an answer came from in front of Flask

# On every answer, unless the view says otherwise of itself; Nginx has the same for its own (deploy/nginx)
PROTECTION = (
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
)

_GIVEN = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TASK_ID = re.compile(r"[0-9a-f-]{1,64}")  # anything else could be a key that somebody pasted


class RequestLog:
    """Gives each request an id (the caller's own, if it is well formed), and logs it when it has been answered."""

    def __init__(self, app: WSGIApplication, answered: Answered = lambda *_: None) -> None:
        """`answered` is told of each: its route's rule, its method, its status, and the seconds that it took."""
        self._app = app
        self._answered = answered

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        began = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        own = given if _GIVEN.fullmatch(given) else secrets.token_hex(8)
        environ[REQUEST_ID] = own
        line: dict[str, Any] = {"status": None}
        span = traces.begin(environ)

        def start(code: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Any:
            line.update(_what(environ), status=int(code[:3]))
            said = {name.lower() for name, _ in headers}
            headers += [("X-Request-ID", own), *(one for one in PROTECTION if one[0].lower() not in said)]
            return start_response(code, headers, exc_info)

        try:
            return self._app(environ, start)
        finally:
            seconds, method = time.perf_counter() - began, environ["REQUEST_METHOD"]
            _log().info("request", request_id=own, method=method, duration_ms=round(seconds * 1000, 2), **line)
            self._answered(line.get("route"), method, line["status"], seconds)
            if span is not None:
                traces.end(span, own, line)


def current_id() -> str:
    """Return the id of the request that is being served."""
    own: str = request.environ[REQUEST_ID]
    return own


def about(task_id: str) -> None:
    """Note which task this request made, for its line in the log."""
    request.environ[TASK_ID] = task_id


def task() -> str | None:
    """Return the task that the current request is noted to have made, if any."""
    made: str | None = request.environ.get(TASK_ID)
    return made


def is_idempotent() -> bool:
    """Return whether the current request may be sent again without making another task."""
    return "HTTP_IDEMPOTENCY_KEY" in request.environ


@functools.cache
def _log() -> FilteringBoundLogger:
    """Return the logger, bound for good: not at import, before logging is configured, nor again for each line."""
    bound: FilteringBoundLogger = telemetry.get_logger().bind()
    return bound


def _what(environ: WSGIEnvironment) -> dict[str, str | None]:
    """Return what was asked for, by the route's rule (a path could hold anything), and of which task.

    Flask takes its request out of `environ` as soon as the answer has begun.
    """
    route, task_id = environ.get(ROUTE), environ.get(TASK_ID)
    asked: Request | None = environ.get("werkzeug.request")
    if route is None and asked is not None and asked.url_rule is not None:
        route = asked.url_rule.rule
        task_id = task_id or (asked.view_args or {}).get("task_id")
    line = {"route": route}
    return {**line, "task_id": task_id} if task_id and _TASK_ID.fullmatch(task_id) else line
