"""What clients of OpenAI's image API are answered: pictures, events, models, errors."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Literal

from flask import Response
from flask_openapi3.types import ResponseDict
from flask_openapi3.utils import parse_body
from pydantic import BaseModel

from common.errors import (
    DeadlineExceeded,
    FleetError,
    InvalidRequest,
    MalformedBody,
    RateLimited,
    Unauthenticated,
    UnknownModel,
    UnknownTask,
)
from common.schemas import ImageFormat, ImageRef, TaskRecord
from gateway import problems, requestlog
from gateway.api import NO_STORE, Api, json_answer
from gateway.dialects._openai_fields import Asked
from gateway.problems import Answer

PIXELS_A_TOKEN = 16 * 16  # of Z-Image, whose transformer sees a picture so
OWNER = "zfleet"

# Where OpenAI's clients know another kind of error, with its status and code. The rest keep theirs.
_KINDS: dict[str, type[FleetError]] = {
    InvalidRequest.code: MalformedBody,
    DeadlineExceeded.code: MalformedBody,
    UnknownModel.code: UnknownTask,
}
_CODES = {
    Unauthenticated.code: "invalid_api_key",
    UnknownModel.code: "model_not_found",
    RateLimited.code: "rate_limit_exceeded",
}
_PARAMS = {  # what the fields of a GenerateRequest are called here
    "width": "size", "height": "size", "format": "output_format", "quality": "output_compression",
    "init_image": "image", "reference_images": "image", "mask_image": "mask",
}  # fmt: skip


class TokenDetails(BaseModel):
    """Tokens by kind."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens, of which those of the pictures made are counted: one for 16 x 16 pixels. Prompts and inputs are not."""

    input_tokens: int = 0
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails = TokenDetails(image_tokens=0, text_tokens=0)
    output_tokens_details: TokenDetails


class Image(BaseModel):
    """One picture."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: None = None  # prompts are painted as they are
    seed: int


class ImagesResponse(BaseModel):
    """The pictures of a task that has succeeded."""

    created: int
    data: Sequence[Image]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    quality: str
    size: str
    usage: Usage


class PartialImage(BaseModel):
    """A small picture of what is being painted; a WebP file, whatever the final one will be."""

    type: str
    b64_json: str
    partial_image_index: int
    created_at: int
    size: str
    quality: str
    background: Literal["opaque"] = "opaque"
    output_format: Literal["webp"] = "webp"


class CompletedImage(BaseModel):
    """The finished picture."""

    type: str
    b64_json: str
    created_at: int
    size: str
    quality: str
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    usage: Usage


class Model(BaseModel):
    """A model, or an alias of one."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0  # nobody knows
    owned_by: str = OWNER


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: Sequence[Model]


class ErrorDetail(BaseModel):
    """What is wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class StreamError(OpenAIError):
    """An error in the middle of a stream."""

    type: Literal["error"] = "error"


def usage(record: TaskRecord) -> Usage:
    """Return what the pictures of a task count for."""
    tokens = record.request.n * record.request.width * record.request.height // PIXELS_A_TOKEN
    details = TokenDetails(image_tokens=tokens, text_tokens=0)
    return Usage(output_tokens=tokens, total_tokens=tokens, output_tokens_details=details)


def images(
    record: TaskRecord, asked: Asked, *, link: Callable[[int, ImageRef], str], read: Callable[[ImageRef], bytes]
) -> ImagesResponse:
    """Return the pictures of a finished task, by `link` or with the bytes that `read` gets."""
    if asked.response_format == "url":
        data = [Image(url=link(index, image), seed=image.seed) for index, image in enumerate(record.images)]
    else:
        data = [Image(b64_json=encoded(read(image)), seed=image.seed) for image in record.images]
    return ImagesResponse(
        created=_seconds(record),
        data=data,
        output_format=record.request.format,
        quality=asked.shown_quality,
        size=_size(record),
        usage=usage(record),
    )


def partial(record: TaskRecord, asked: Asked, call: str, index: int, preview: str) -> str:
    """Return the event of a preview, which is base64 of a WebP file."""
    return event(
        PartialImage(
            type=f"{call}.partial_image",
            b64_json=preview,
            partial_image_index=index,
            created_at=_seconds(record),
            size=_size(record),
            quality=asked.shown_quality,
        )
    )


def completed(record: TaskRecord, asked: Asked, call: str, picture: bytes) -> str:
    """Return the event of the finished picture."""
    return event(
        CompletedImage(
            type=f"{call}.completed",
            b64_json=encoded(picture),
            created_at=_seconds(record),
            size=_size(record),
            quality=asked.shown_quality,
            output_format=record.request.format,
            usage=usage(record),
        )
    )


def failed(error: FleetError) -> str:
    """Return the event of an error."""
    return event(StreamError(error=detail(problems.describe(error))))


def event(data: PartialImage | CompletedImage | StreamError) -> str:
    """Return one server-sent event."""
    return f"event: {data.type}\ndata: {data.model_dump_json()}\n\n"


def encoded(data: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(data).decode("ascii")


def detail(answer: Answer) -> ErrorDetail:
    """Return an error in OpenAI's words: its fields under their names here, the first of them as `param`."""
    problem = answer.problem
    named = [(_param(field.loc), field.msg) for field in problem.errors]
    told = dict.fromkeys(f"{param}: {msg}" if param else msg for param, msg in named)
    kind = _status(problem.code, problem.status)
    return ErrorDetail(
        message="; ".join(told) or problem.detail,
        type="server_error" if kind // 100 == 5 else "invalid_request_error",
        param=next((param for param, _ in named if param), None),
        code=_CODES.get(problem.code, problem.code),
    )


def refusal(answer: Answer) -> Response:
    """Return an error as OpenAI's clients read it.

    They repeat a call of their own accord unless told otherwise, which would make another task where there is one.
    """
    again = "Retry-After" in answer.headers and (requestlog.task() is None or requestlog.is_idempotent())
    headers = {**NO_STORE, **answer.headers, "X-Should-Retry": "true" if again else "false"}
    return json_answer(OpenAIError(error=detail(answer)), _status(answer.problem.code, answer.problem.status), headers)


def documented(*errors: type[FleetError]) -> ResponseDict:
    """Return what the API description says of these errors; see problems.documented."""
    found: ResponseDict = {}
    for error in errors or (None,):
        described = problems.documented(error) if error else problems.documented()
        for status, response in described.items():
            code = getattr(error, "code", "")
            place = str(_status(code, int(status))) if code else str(status)
            told = _CODES.get(code, code) or str(response["description"])  # type: ignore[index]
            earlier = found.get(place)
            words = f"{earlier['description']}, {told}" if isinstance(earlier, dict) else told
            found[place] = {"description": words, "content": content(OpenAIError)}
    return found


def content(model: type[BaseModel]) -> dict[str, object]:
    """Return the content of an answer that is this model, for the API description."""
    return dict(parse_body(model)[0])


def describe_models(api: Api) -> None:
    """Add the models of answers that are described by `content` to the API description."""
    for model in (ImagesResponse, OpenAIError):
        api.components_schemas.update(parse_body(model)[1])


def _param(loc: str) -> str | None:
    """Return what a field of a GenerateRequest is called here, as `image.1` for `reference_images.1`."""
    field, dot, rest = loc.partition(".")
    return None if loc == "body" else _PARAMS.get(field, field) + dot + rest


def _status(code: str, status: int) -> int:
    kind = _KINDS.get(code)
    return problems.status_of(kind)[0] if kind else status


def _seconds(record: TaskRecord) -> int:
    return int((record.finished_at or record.created_at).timestamp())


def _size(record: TaskRecord) -> str:
    return f"{record.request.width}x{record.request.height}"
