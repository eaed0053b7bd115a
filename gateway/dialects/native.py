"""zfleet's own API: submit, status, cancel, list, events. The one that the CLI and the Python client speak."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import random
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import chain
from typing import Annotated

from flask import Response, request
from flask_openapi3.types import ResponseDict
from pydantic import AfterValidator, Field

from common.apikeys import EVERYBODY, TENANT
from common.errors import (
    AlreadyFinal,
    Forbidden,
    IdempotencyConflict,
    InvalidRequest,
    MalformedBody,
    QueueFull,
    QuotaUsedUp,
    RedisUnavailable,
    StorageError,
    StorageFull,
    TaskExpired,
    TooBusy,
    TooLate,
    UnknownModel,
    UnknownTask,
    UnsupportedMediaType,
)
from common.schemas import (
    GenerateRequest,
    ImageView,
    Progress,
    StageTimings,
    SubmitAnswer,
    TaskPage,
    TaskRecord,
    TaskStatus,
    TaskView,
    Timings,
    WebhookView,
)
from gateway import admission, answers, problems, requestlog
from gateway.api import NO_STORE, Api, Query, TaskPath, json_answer
from gateway.bodies import FilePart, Form
from gateway.described import EVENT
from gateway.dialects.base import Gateway, SubmitHeader
from gateway.images import Images
from gateway.places import Place, mark

WAIT_MAX_S = 60
PAGE_MAX = 200
RETRY_MS = (1000, 3000)  # after which a client should come back; not all at once when a gateway has gone
RENDERED_MAX = 64  # tasks whose JSON is kept for the others who follow them
ETA_GRAINS = 4  # to an octave: estimates that differ by less than a fifth are alike to an ETag

UNCHANGED = {"description": "Nothing has changed since the answer whose ETag came back as If-None-Match."}

_PLACE = re.compile(r"([0-9]{1,16}):([A-Za-z0-9_-]{1,64})")
_NO_STAGES = StageTimings()


def _whose(tenant: str) -> str:
    if tenant != EVERYBODY and not TENANT.fullmatch(tenant):
        raise ValueError("must be a tenant's name, of a-z, 0-9 and -, or * for all")
    return tenant


class SubmitForm(Form):
    """A submit with files of pictures beside its JSON."""

    request: GenerateRequest = Field(description="The other fields, as JSON.")
    init_image: FilePart | None = None
    mask_image: FilePart | None = None
    control_image: FilePart | None = None
    reference_images: Sequence[FilePart] = ()


class StatusQuery(Query):
    """Parameters of a status."""

    wait: float = Field(
        0, ge=0, le=WAIT_MAX_S, allow_inf_nan=False, description="Seconds to hold the answer until the task is final."
    )


class ListQuery(Query):
    """Parameters of a list of tasks."""

    status: TaskStatus | None = Field(None, description="Only tasks in this state.")
    model: str | None = Field(None, max_length=32, description="Only tasks of this model.")
    limit: int = Field(50, ge=1, le=PAGE_MAX)
    cursor: str | None = Field(None, description="`next_cursor` of the page before.")
    tenant: Annotated[str, AfterValidator(_whose)] | None = Field(
        None, description="With the admin scope: whose tasks, by name; `*` for all. Left out: your own."
    )


def create(gateway: Gateway) -> Api:
    """Return the native routes."""
    api = Api("tasks", __name__, about="Submit prompts, follow them, fetch what came of them.")
    _add_submit(api, gateway)
    _add_status(api, gateway)
    _add_list(api, gateway)
    _add_events(api, gateway)
    return api


def _add_submit(api: Api, gateway: Gateway) -> None:
    refusals = (
        InvalidRequest, UnknownModel, MalformedBody, UnsupportedMediaType, IdempotencyConflict, TaskExpired, QueueFull,
        QuotaUsedUp, TooLate, RedisUnavailable, StorageFull, StorageError, TooBusy,
    )  # fmt: skip

    @api.post("/api/submit", responses={"202": SubmitAnswer, **problems.documented(*refusals)})
    @admission.submits
    def submit(body: GenerateRequest, form: SubmitForm, header: SubmitHeader) -> Response:
        """Submit a prompt. Answers at once; the pictures come later, under `status_url`."""
        accepted = gateway.tasks.submit(
            body,
            admission.caller(),
            request_id=requestlog.current_id(),
            idempotency_key=header.idempotency_key or "",
            files=form.files,
        )
        return answers.accepted(accepted)


def _add_status(api: Api, gateway: Gateway) -> None:
    absent = problems.documented(UnknownTask, TaskExpired, RedisUnavailable)

    @api.get(
        "/api/status/<task_id>",
        responses={"200": TaskView, "304": UNCHANGED, **absent, **problems.documented(InvalidRequest)},
    )
    def status(path: TaskPath, query: StatusQuery) -> Response:
        """Read a task. With `wait` the answer comes as soon as the task is final, or when the time is up."""
        view = render(gateway.tasks.wait(path.task_id, query.wait, admission.caller()))
        tag = etag(view)
        headers = {"ETag": f'W/"{tag}"', **NO_STORE}
        if request.if_none_match.contains_weak(tag):
            return Response(status=304, headers=headers)
        return json_answer(view, headers=headers)

    @api.post("/api/cancel/<task_id>", responses={"200": TaskView, **absent, **problems.documented(AlreadyFinal)})
    def cancel(path: TaskPath) -> Response:
        """Cancel a task. A queued one is gone at once; a running one stops at its next step."""
        record = gateway.tasks.cancel(path.task_id, admission.caller())
        return json_answer(render(record), headers=NO_STORE)


def _add_list(api: Api, gateway: Gateway) -> None:
    refusals = (InvalidRequest, Forbidden, RedisUnavailable)

    @api.get("/api/tasks", responses={"200": TaskPage, **problems.documented(*refusals)})
    def tasks(query: ListQuery) -> Response:
        """List your tasks, newest first."""
        before = parse_cursor(query.cursor) if query.cursor is not None else None
        caller = admission.caller()
        tenant = query.tenant or caller.tenant
        if not caller.may_see(tenant):
            raise Forbidden("the tasks of other tenants are for keys with the admin scope; leave `tenant` out")
        found, then = gateway.tasks.page(
            tenant, status=query.status, model=query.model, limit=query.limit, before=before
        )
        return json_answer(TaskPage(tasks=found, next_cursor=then and render_cursor(then)), headers=NO_STORE)


def _add_events(api: Api, gateway: Gateway) -> None:
    described: ResponseDict = {
        "200": {
            "description": "`status` (the task, first and at each change), `progress` ({step, steps, preview}: a new "
            "one or null), and in the end one of `succeeded`, `failed`, `canceled`, `expired` (the task).",
            "content": {"text/event-stream": {"schema": EVENT}},
        },
        "204": {"description": "The stream had ended: its Last-Event-ID came back."},
        **problems.documented(UnknownTask, TaskExpired, RedisUnavailable),
    }

    @api.get("/api/tasks/<task_id>/events", responses=described)
    def events(path: TaskPath) -> Response:
        """Follow a task as server-sent events, until it is final."""
        told = Place.parse(request.headers.get("Last-Event-ID"))
        stream = gateway.tasks.follow(path.task_id, admission.caller(), told)
        try:
            first = next(stream)  # an error comes before the stream begins, as a problem
        except StopIteration:
            return Response(status=204)  # the one answer that keeps a browser's EventSource from reconnecting
        headers = {"X-Accel-Buffering": "no", **NO_STORE}
        return Response(render_events(chain([first], stream), told), headers=headers, mimetype="text/event-stream")


def render(record: TaskRecord) -> TaskView:
    """Return the task as its owner sees it."""
    stages = record.stages or _NO_STAGES
    timings = Timings(
        queued_ms=_ms(record.created_at, record.started_at),
        total_ms=_ms(record.created_at, record.finished_at),
        load_ms=stages.load_ms,
        encode_ms=stages.encode_ms,
        denoise_ms=stages.denoise_ms,
        decode_ms=stages.decode_ms,
        store_ms=stages.store_ms,
    )
    images = [
        ImageView(url=Images.url(record.task_id, index, image), **image.model_dump(exclude={"key"}))
        for index, image in enumerate(record.images)
    ]
    webhook = record.request.webhook
    return TaskView(
        task_id=record.task_id,
        tenant=record.tenant,
        status=record.status,
        model=record.request.model,
        progress=Progress(step=record.step, steps=record.request.steps, preview=preview_url(record.preview)),
        position=record.position,
        eta_seconds=record.eta_seconds,
        attempts=record.attempts,
        images=images,
        error=record.error,
        warnings=record.warnings,
        timings=timings,
        request=record.request,
        retry_of=record.retry_of,
        webhook=WebhookView(url=webhook.url, deliveries=record.deliveries) if webhook else None,
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        expires_at=record.expires_at,
    )


def etag(view: TaskView) -> str:
    """Return what changes whenever anything in a status does, but for an estimate that is as good as the same."""
    eta = view.eta_seconds
    grain = None if eta is None else round(ETA_GRAINS * math.log2(max(eta, 1.0)))
    text = view.model_copy(update={"eta_seconds": grain}).model_dump_json()
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def preview_url(preview: str | None) -> str | None:
    """Return a preview as a data: URL."""
    return preview and f"data:image/webp;base64,{preview}"


def render_events(stream: Iterator[TaskRecord | Progress | None], told: Place | None = None) -> Iterator[str]:
    """Return what `Tasks.follow` yields as server-sent events, to whoever was told up to a place.

    Each has for its id the place it tells of. A silence becomes a comment.
    """
    yield f"retry: {random.randint(*RETRY_MS)}\n\n"
    for seen in stream:
        if seen is None:
            yield ": still here\n\n"
        elif isinstance(seen, Progress):
            assert told is not None  # the task as it is comes first
            told = told._replace(step=seen.step, preview=mark(seen.preview) or told.preview)
            step = seen.model_copy(update={"preview": preview_url(seen.preview)}) if seen.preview else seen
            yield _event("progress", told, step.model_dump_json())
        else:
            anew, told = told is None or not told.is_of(seen), Place.of(seen)
            data = _once(seen)
            if anew or not seen.status.final:
                yield _event("status", told, data)
            if seen.status.final:
                yield _event(seen.status, told, data)


def render_cursor(place: tuple[int, str]) -> str:
    """Return a place in the list of tasks as one opaque word."""
    return base64.urlsafe_b64encode(f"{place[0]}:{place[1]}".encode()).decode().rstrip("=")


def parse_cursor(cursor: str) -> tuple[int, str]:
    """Return the place that `render_cursor` made into this word; raises InvalidRequest for any other."""
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    match = _PLACE.fullmatch(text)
    if match is None:
        raise InvalidRequest.field("cursor", "is not one of this list's; pass next_cursor back as it came")
    return int(match[1]), match[2]


def _event(name: str, place: Place, data: str) -> str:
    return f"event: {name}\nid: {place}\ndata: {data}\n\n"


_rendered: dict[str, tuple[TaskRecord, str]] = {}  # by task


def _once(record: TaskRecord) -> str:
    """Return the task as JSON, made once for all who are told of the same record at a time."""
    kept = _rendered.get(record.task_id)
    if kept is None or kept[0] is not record:
        if len(_rendered) >= RENDERED_MAX:
            _rendered.clear()
        kept = _rendered[record.task_id] = (record, render(record).model_dump_json())
    return kept[1]


def _ms(begin: datetime, end: datetime | None) -> float | None:
    return None if end is None else (end - begin).total_seconds() * 1000
