"""OpenAI's image API: generations, edits and models, for stock clients whose base URL is http://this-gateway/v1.

Calls answer when the pictures are there. The task behind a call is like any other: its id is in the header X-Task-ID
of every answer, and it goes on whatever becomes of the call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Literal

from flask import Response
from flask_openapi3.types import ResponseDict
from pydantic import BaseModel, Field

from common.errors import (
    DeadlineExceeded,
    FleetError,
    IdempotencyConflict,
    InvalidRequest,
    MalformedBody,
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
    UnknownModel,
    UnsupportedMediaType,
)
from common.schemas import GenerateRequest, ImageRef, Progress, TaskRecord
from gateway import admission, bodies, outcome, problems, requestlog
from gateway.admission import Caller
from gateway.api import NO_STORE, Api, json_answer
from gateway.dialects import _openai_answers as answers
from gateway.dialects import _openai_errors as errors
from gateway.dialects import _openai_fields as asking
from gateway.dialects._openai_answers import ImagesResponse, Model, ModelList
from gateway.dialects._openai_fields import Asked, ImageEdit, ImageGeneration
from gateway.dialects.base import Gateway, SubmitHeader

WAIT_S = 590.0  # Nginx waits 600 s for these calls, and so does OpenAI's client
MARGIN_S = 5.0  # before the client itself gives up, and asks again

Call = Literal["image_generation", "image_edit"]

REFUSALS = (
    InvalidRequest, MalformedBody, UnknownModel, UnsupportedMediaType, IdempotencyConflict, QueueFull, QuotaUsedUp,
    RateLimited, TooLate, RedisUnavailable, StorageFull, StorageError, TooBusy, TaskFailed, TaskCanceled, TaskExpired,
    TaskUnfinished, DeadlineExceeded,
)  # fmt: skip


class CallHeader(SubmitHeader):
    """Headers of a call that waits: OpenAI's clients say for how many seconds they do."""

    read_timeout: str = Field("", alias="X-Stainless-Read-Timeout", description="Answer before so many seconds.")
    timeout: str = Field("", alias="X-Stainless-Timeout", description="The same, as other clients send it.")


class ModelPath(BaseModel):
    """One model."""

    model: str = Field(description="An id of /v1/models.")


def create(gateway: Gateway) -> Api:
    """Return OpenAI's routes."""
    api = Api("openai", __name__, about="OpenAI's image API, for its clients.", documented=errors.documented)
    problems.install(api, errors.refusal, under="/v1/")
    answers.describe_models(api)
    _add_images(api, gateway)
    _add_models(api, gateway)

    @api.after_request
    def name_the_task(answer: Response) -> Response:
        if task_id := requestlog.task():
            answer.headers["X-Task-ID"] = task_id
        return answer

    return api


def _add_images(api: Api, gateway: Gateway) -> None:
    @api.post("/v1/images/generations", responses=_described("image_generation"))
    @admission.submits
    def generate(body: ImageGeneration, header: CallHeader) -> Response:
        """Make pictures from a prompt. Answers with the pictures when they are there, or with events until then."""
        submit(gateway, asking.generation(body, gateway), header)
        return _answer(gateway, body, header, "image_generation")

    @api.post("/v1/images/edits", responses=_described("image_edit"))
    @admission.submits
    def edit(header: CallHeader) -> Response:
        """Make pictures from others and a prompt. Answers like generations."""
        return _answer(gateway, _take_edit(gateway, header), header, "image_edit")

    api.takes_form("/v1/images/edits", ImageEdit)


def _add_models(api: Api, gateway: Gateway) -> None:
    @api.get("/v1/models", responses={"200": ModelList, **errors.documented(RedisUnavailable)})
    def models() -> Response:
        """List the models, and the names of `ZFLEET_MODEL_ALIASES`."""
        names = [*gateway.catalogue, *gateway.aliases]
        return json_answer(ModelList(data=[Model(id=name) for name in dict.fromkeys(names)]), headers=NO_STORE)

    @api.get("/v1/models/<model>", responses={"200": Model, **errors.documented(UnknownModel, RedisUnavailable)})
    def model(path: ModelPath) -> Response:
        """Look one model up."""
        gateway.catalogue[gateway.aliases.get(path.model, path.model)]
        return json_answer(Model(id=path.model), headers=NO_STORE)


def _take_edit(gateway: Gateway, header: CallHeader) -> Asked:
    """Submit the form that this request is. Nothing of its pictures is in memory once this is done."""
    with bodies.turn():
        asked = asking.read_edit(bodies.read_parts(asking.MAX_PARTS))
        request, files = asking.edit(asked, gateway)
        submit(gateway, request, header, files)
    return Asked.model_construct(**{name: getattr(asked, name) for name in Asked.model_fields})


def submit(
    gateway: Gateway, request: GenerateRequest, header: CallHeader, files: Mapping[str, bytes] | None = None
) -> None:
    """Make the task of this request."""
    accepted = gateway.tasks.submit(
        request,
        admission.caller(),
        request_id=requestlog.current_id(),
        idempotency_key=header.idempotency_key or "",
        files=files or {},
    )
    requestlog.about(accepted.task_id)


def _answer(gateway: Gateway, asked: Asked, header: CallHeader, call: Call) -> Response:
    """Return what came of the task of this request, when it is there."""
    task_id, caller = requestlog.task() or "", admission.caller()
    if asked.stream:
        return _stream(gateway, asked, task_id, caller, call)
    record = outcome.wait_for(gateway.tasks, task_id, caller, patience_s(header))

    def link(index: int, image: ImageRef) -> str:
        return gateway.links.url(gateway.images.url(task_id, index, image))

    return json_answer(answers.images(record, asked, link=link, read=gateway.images.read), headers=NO_STORE)


def patience_s(header: CallHeader) -> float:
    """Return how long a call may wait: less than its client does, which would ask again on its own after that."""
    told = [float(text) for text in (header.read_timeout, header.timeout) if text.replace(".", "", 1).isdecimal()]
    known = [seconds for seconds in told if 0 < seconds < math.inf]
    return min([WAIT_S, *(seconds - min(MARGIN_S, seconds / 10) for seconds in known)])


def _stream(gateway: Gateway, asked: Asked, task_id: str, caller: Caller, call: Call) -> Response:
    seen = gateway.tasks.follow(task_id, caller)
    first = next(seen)  # an error comes before the stream begins, with its status
    headers = {"X-Accel-Buffering": "no", **NO_STORE}
    return Response(events(gateway, asked, chain([first], seen), call), headers=headers, mimetype=answers.STREAM)


def events(gateway: Gateway, asked: Asked, seen: Iterator[TaskRecord | Progress | None], call: Call) -> Iterator[str]:
    """Return what `Tasks.follow` yields as OpenAI's events, which end with the picture or with an error.

    The pictures on the way are spread over the steps, as far as previews come; the first line tells the task's id.
    """
    record: TaskRecord | None = None
    preview, sent, most = None, 0, asked.partial_images or 0
    try:
        for each in seen:
            if each is None:
                yield ": still here\n\n"
            elif isinstance(each, TaskRecord):
                yield f": task {each.task_id} is {each.status}\n\n"
                record, preview = each, each.preview or preview
            elif record is not None:
                preview = each.preview or preview
                if preview and sent < most and each.step * (most + 1) >= each.steps * (sent + 1):
                    yield answers.partial(record, asked, call, sent, preview)
                    preview, sent = None, sent + 1
        if record is None or not record.status.final:
            raise outcome.unfinished(record.task_id if record else "")
        (image, *_) = outcome.check(record).images
        yield answers.completed(record, asked, call, gateway.images.read(image))
    except FleetError as error:
        yield answers.failed(error)


def _described(call: Call) -> ResponseDict:
    streamed = f"up to `partial_images` times `{call}.partial_image`, then `{call}.completed`, or `error`"
    done = {
        "description": f"The pictures. With `stream`, events: {streamed}.",
        "content": errors.content(ImagesResponse) | answers.streamed(),
        "headers": {"X-Task-ID": {"description": "The task behind this call.", "schema": {"type": "string"}}},
    }
    return {"200": done, **errors.documented(*REFUSALS, *problems.BODY)}
