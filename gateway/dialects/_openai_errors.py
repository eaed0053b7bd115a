"""Errors as clients of OpenAI's API read them: their shape, their statuses, their words, and whether to call again."""

from __future__ import annotations

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
from gateway import problems, requestlog
from gateway.api import NO_STORE, json_answer
from gateway.problems import Answer

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
_PARAMS = {  # what the fields of a GenerateRequest are called here, but for `quality`, which is another one here
    "width": "size", "height": "size", "format": "output_format",
    "init_image": "image", "reference_images": "image", "mask_image": "mask",
}  # fmt: skip


class ErrorDetail(BaseModel):
    """What is wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """The body of every error."""

    error: ErrorDetail


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


def documented(*errors: type[FleetError] | int) -> ResponseDict:
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


def _param(loc: str) -> str | None:
    """Return what a field of a GenerateRequest is called here, as `image.1` for `reference_images.1`."""
    field, dot, rest = loc.partition(".")
    return None if loc == "body" else _PARAMS.get(field, field) + dot + rest


def _status(code: str, status: int) -> int:
    kind = _KINDS.get(code)
    return problems.status_of(kind)[0] if kind else status
