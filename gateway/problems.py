"""Every error as HTTP: the only file that knows which status an error has. Bodies are RFC 9457 problem documents."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, cast

from flask import Blueprint, Flask, Response, current_app, request
from flask_openapi3.types import ResponseDict
from werkzeug.exceptions import HTTPException

from common import telemetry
from common.errors import (
    AlreadyFinal,
    DeadlineExceeded,
    FleetError,
    Forbidden,
    IdempotencyConflict,
    InputGone,
    InvalidRequest,
    KeyNotActive,
    MalformedBody,
    NotRetryable,
    NoWorker,
    QueueFull,
    QuotaUsedUp,
    RateLimited,
    RedisUnavailable,
    StorageError,
    StorageFull,
    TaskCanceled,
    TaskExpired,
    TaskFailed,
    TaskUnfinished,
    TooBusy,
    TooLate,
    Unauthenticated,
    UnknownImage,
    UnknownKey,
    UnknownLora,
    UnknownModel,
    UnknownTask,
    UnknownWorker,
    UnsupportedMediaType,
)
from common.problem import Problem, ProblemField
from gateway import requestlog

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:zfleet:problem:"  # + code: names a kind of problem for ever, and promises no page

RENDERS = "zfleet.renders"  # in app.extensions: who gives errors their form, by the paths' beginning

DEFAULT = "default"  # OpenAPI's word for every status that is not listed

log = telemetry.get_logger()


class Kind(NamedTuple):
    """What HTTP makes of an error code; `retry_after_s` is sent where coming back later may help."""

    status: int
    title: str
    retry_after_s: int | None = None


INTERNAL = Kind(500, "Internal error")
KINDS: Mapping[str, Kind] = {
    InvalidRequest.code: Kind(422, "Invalid request"),
    UnknownModel.code: Kind(422, "Unknown model"),
    UnknownLora.code: Kind(422, "Unknown LoRA"),
    MalformedBody.code: Kind(400, "Malformed body"),
    UnsupportedMediaType.code: Kind(415, "Unsupported media type"),
    UnknownTask.code: Kind(404, "Unknown task"),
    UnknownImage.code: Kind(404, "Unknown image"),
    UnknownWorker.code: Kind(404, "Unknown worker"),
    UnknownKey.code: Kind(404, "Unknown API key"),
    KeyNotActive.code: Kind(409, "API key is not active"),
    TaskExpired.code: Kind(410, "Task expired"),
    TaskFailed.code: Kind(503, "Task failed"),
    DeadlineExceeded.code: Kind(422, "Deadline exceeded"),
    TaskCanceled.code: Kind(409, "Task canceled"),
    TaskUnfinished.code: Kind(504, "Task goes on", 1),
    AlreadyFinal.code: Kind(409, "Task is already final"),
    NotRetryable.code: Kind(409, "Task is not to be done over"),
    InputGone.code: Kind(410, "Picture to start from is gone"),
    IdempotencyConflict.code: Kind(409, "Idempotency-Key reused"),
    Unauthenticated.code: Kind(401, "API key needed"),
    Forbidden.code: Kind(403, "Not for this key"),
    QueueFull.code: Kind(429, "Queue full", 5),
    QuotaUsedUp.code: Kind(429, "Quota used up", 5),
    RateLimited.code: Kind(429, "Rate limit", 1),
    TooLate.code: Kind(503, "Too late", 5),
    RedisUnavailable.code: Kind(503, "Redis unavailable", 2),
    StorageError.code: Kind(503, "Storage unavailable", 5),
    StorageFull.code: Kind(503, "Storage full", 30),
    TooBusy.code: Kind(503, "Too busy", 5),
    NoWorker.code: Kind(503, "No live worker", 5),
}
HTTP_CODES: Mapping[int, tuple[str, str]] = {  # what werkzeug raises: code and, where its own is no help, a message
    400: ("bad_request", ""),
    404: ("not_found", "there is nothing at this address; the API is described at /docs"),
    405: ("method_not_allowed", "this method is not allowed here; see the Allow header"),
    408: ("request_timeout", "the body came too slowly; send it again over a faster connection"),
    413: ("body_too_large", "the body is larger than {limit} bytes"),
}
UNREADABLE: Mapping[str, tuple[Kind, str]] = {  # what gunicorn raises before there is a request, by its class
    "LimitRequestLine": (Kind(414, "URI Too Long"), "uri_too_long"),
    "LimitRequestHeaders": (Kind(431, "Request Header Fields Too Large"), "headers_too_large"),
}
OF_HTTP: Mapping[int, str] = {  # each status that is not a FleetError's, and its code
    **{status: code for status, (code, _) in HTTP_CODES.items()},
    **{kind.status: code for kind, code in UNREADABLE.values()},
}
EVERYWHERE = (400, 414, 431)  # whatever is asked for
BODY = (408, 413)  # where a body is read
HEADERS: Mapping[str, Collection[str]] = {"WWW-Authenticate": ("401",), "Retry-After": ("429", "503")}


class Answer(NamedTuple):
    """A problem and the headers that go with it."""

    problem: Problem
    headers: Mapping[str, str]


Render = Callable[[Answer], Response]


def describe(error: Exception) -> Answer:
    """Return what a client may know of an error; one that nobody foresaw is logged, and told as no more than that."""
    if isinstance(error, FleetError) and error.code in KINDS:
        return _foreseen(error, KINDS[error.code])
    if isinstance(error, HTTPException) and error.code is not None:
        return _from_http(error, error.code)
    # no message: pydantic's and others' repeat what a client sent
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("request_failed", request_id=requestlog.current_id(), error=type(error).__name__, traceback=where)
    detail = f"something went wrong here, and was logged; quote request id {requestlog.current_id()}"
    return Answer(_problem(INTERNAL, "internal", detail), {})


def render(answer: Answer) -> Response:
    """Return the answer as application/problem+json."""
    body = answer.problem.model_dump_json()
    headers = {"Cache-Control": "no-store", **answer.headers}
    return Response(body, answer.problem.status, headers, content_type=MEDIA_TYPE)


def install(target: Flask | Blueprint, render: Render = render, *, under: str = "") -> None:
    """Answer every exception of an app with `render`; a dialect may do so for its own blueprint in its own form.

    With `under`, the blueprint's form is also that of errors at addresses which begin so and lead nowhere.
    """
    if under:
        blueprint = cast("Blueprint", target)
        blueprint.record(lambda state: state.app.extensions.setdefault(RENDERS, {}).update({under: render}))

    @target.errorhandler(Exception)
    def answer(error: Exception) -> Response | HTTPException:
        if isinstance(error, HTTPException) and error.response is not None:
            return error
        others: Mapping[str, Render] = current_app.extensions.get(RENDERS, {}) if isinstance(target, Flask) else {}
        chosen = next((other for begin, other in others.items() if request.path.startswith(begin)), render)
        return chosen(describe(error))


def unreadable(error: Exception) -> bytes:
    """Return the whole answer, as it goes over the wire, to what is no well-formed HTTP request."""
    kind, code = UNREADABLE.get(type(error).__name__, (Kind(400, "Bad Request"), "bad_request"))
    body = _problem(kind, code, "the request is not well-formed HTTP, or its line or headers are too large")
    data = body.model_dump_json().encode()
    headers = [("Connection", "close"), ("Content-Type", MEDIA_TYPE), ("Content-Length", len(data))]
    lines = "".join(f"{name}: {value}\r\n" for name, value in (*headers, *requestlog.PROTECTION))
    return f"HTTP/1.1 {kind.status} {kind.title}\r\n{lines}\r\n".encode() + data


def documented(*errors: type[FleetError] | int) -> ResponseDict:
    """Return what the API description says of these errors, for a call's `responses`; HTTP's own are given by status.

    Without any: what it says of all others.
    """
    by_status: dict[str, list[str]] = {} if errors else {DEFAULT: ["any other problem"]}
    for error in errors:
        status, code = _status_and_code(error)
        by_status.setdefault(str(status), []).append(code)
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": ", ".join(codes), "content": content, **documented_headers(status)}
        for status, codes in by_status.items()
    }


def _status_and_code(error: type[FleetError] | int) -> tuple[int, str]:
    return (error, OF_HTTP[error]) if isinstance(error, int) else (KINDS[error.code].status, error.code)


def documented_headers(status: str) -> dict[str, Any]:
    """Return what the API description says of the headers that every problem of this status has."""
    names = [name for name, statuses in HEADERS.items() if status in statuses]
    described = {name: {"required": True, "schema": {"type": "string"}} for name in names}
    return {"headers": described} if described else {}


def status_of(error: type[FleetError]) -> tuple[int, Mapping[str, str]]:
    """Return the HTTP status of an error and its headers, for a call that answers with a body of its own."""
    return KINDS[error.code].status, _retry_after(KINDS[error.code])


def _foreseen(error: FleetError, kind: Kind) -> Answer:
    fields = [ProblemField(loc=loc, msg=msg) for loc, msg in error.errors]
    return Answer(_problem(kind, error.code, error.message, fields), _headers(error, kind))


def _headers(error: FleetError, kind: Kind) -> Mapping[str, str]:
    if isinstance(error, Unauthenticated):
        return {"WWW-Authenticate": 'Bearer realm="zfleet"'}
    if isinstance(error, RateLimited | QuotaUsedUp | TooLate):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    return _retry_after(kind)


def _retry_after(kind: Kind) -> Mapping[str, str]:
    return {} if kind.retry_after_s is None else {"Retry-After": str(kind.retry_after_s)}


def _from_http(error: HTTPException, status: int) -> Answer:
    code, message = HTTP_CODES.get(status, (error.name.lower().replace(" ", "_"), ""))
    detail = message.format(limit=request.max_content_length) or error.description or error.name
    headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After", "Content-Range")}
    return Answer(_problem(Kind(status, error.name), code, detail), headers)


def _problem(kind: Kind, code: str, detail: str, fields: list[ProblemField] | None = None) -> Problem:
    return Problem(
        type=TYPE_PREFIX + code, title=kind.title, status=kind.status, detail=detail, code=code, errors=fields or []
    )
