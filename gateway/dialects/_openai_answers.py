"""What clients of OpenAI's image API are answered: pictures, events, models."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from typing import Literal

from flask_openapi3.utils import parse_body
from pydantic import BaseModel

from common.errors import FleetError
from common.schemas import ImageFormat, ImageRef, TaskRecord
from gateway import problems
from gateway.api import Api
from gateway.dialects._openai_errors import OpenAIError, detail
from gateway.dialects._openai_fields import Asked

PIXELS_A_TOKEN = 16 * 16  # of Z-Image, whose transformer sees a picture so
OWNER = "zfleet"
STREAM = "text/event-stream"


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


class StreamError(OpenAIError):
    """An error in the middle of a stream."""

    type: Literal["error"] = "error"


EVENTS = (PartialImage, CompletedImage, StreamError)


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
            created_at=int(time.time()),
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


def streamed() -> dict[str, object]:
    """Return the content of an answer that is a stream, for the API description, which has each event as its fields."""
    kinds = ", ".join(model.__name__ for model in EVENTS)
    fields = {"event": {"type": "string"}, "data": {"type": "string", "description": f"The JSON of one of {kinds}."}}
    return {STREAM: {"schema": {"type": "object", "properties": fields, "required": list(fields)}}}


def describe_models(api: Api) -> None:
    """Add the models of answers that are described by `content` and `streamed` to the API description."""
    for model in (ImagesResponse, OpenAIError, *EVENTS):
        api.components_schemas.update(parse_body(model)[1])


def _seconds(record: TaskRecord) -> int:
    return int((record.finished_at or record.created_at).timestamp())


def _size(record: TaskRecord) -> str:
    return f"{record.request.width}x{record.request.height}"
