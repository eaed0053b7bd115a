"""Blueprints whose calls are described in /openapi.json by their own annotations, and answers made from wire models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flask import Response, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from common.errors import UnsupportedMediaType
from gateway import fields, problems

JSON = "application/json"
NO_STORE = {"Cache-Control": "no-store"}
JSON_LIMIT_BYTES = 1 << 20  # twice the largest request there is, escapes and all; more would only hold up others


class Query(BaseModel):
    """Base of a call's query parameters: they come as text, the first of several counts, others are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Header(Query):
    """Base of the request headers that a call reads. Each field's alias is its header's name."""


class TaskPath(BaseModel):
    """The task that a call is about."""

    task_id: str = Field(description="As the submit answered.")


class Api(APIBlueprint):
    """A blueprint whose view functions are given what they name: `body`, `query`, `header` and `path`, each a model.

    flask-openapi3 draws the description from the same annotations. It would also read the request, but builds each
    model's JSON schema anew to do so, and parses bodies in a way that cannot tell no JSON from JSON `null`.
    """

    def __init__(self, name: str, import_name: str, *, about: str) -> None:
        tag = Tag(name=name, description=about)
        super().__init__(name, import_name, abp_tags=[tag], abp_responses=problems.documented())

    @staticmethod
    def create_view_func(
        func: Callable[..., Response],
        header: type[Header] | None,
        cookie: Any,
        path: type[BaseModel] | None,
        query: type[Query] | None,
        form: Any,
        body: type[BaseModel] | None,
        raw: Any,
        *_others: Any,
        **_named: Any,
    ) -> Callable[..., Response]:
        names = _environ_names(header) if header is not None else {}

        @functools.wraps(func)
        def view(**parts: Any) -> Response:
            environ = request.environ
            given: dict[str, BaseModel] = {}
            if path is not None:
                given["path"] = path.model_construct(**parts)
            if query is not None:
                given["query"] = _read(query, request.args.to_dict() if environ.get("QUERY_STRING") else None)
            if header is not None:
                sent = {alias: environ[name] for name, alias in names.items() if name in environ}
                given["header"] = _read(header, sent)
            if body is not None:
                given["body"] = read_body(body)
            return func(**given)

        return view


def read_body(model: type[fields.M]) -> fields.M:
    """Return the request's body; raises UnsupportedMediaType, MalformedBody and InvalidRequest.

    A body that does not say what it is counts as JSON. One that says it is a form or plain text is refused, as that is
    what a foreign web page can send without the browser's asking first.
    """
    said = request.environ.get("CONTENT_TYPE", "")
    if said and said != JSON and not request.is_json:
        raise UnsupportedMediaType("the body must be JSON; send the header Content-Type: application/json")
    request.max_content_length = min(request.max_content_length or JSON_LIMIT_BYTES, JSON_LIMIT_BYTES)
    try:
        raw = request.get_data(cache=False)
    except HTTPException:
        raise
    except Exception:  # gunicorn has some ten kinds of its own for a body in broken chunks
        raise fields.malformed("the body broke off, or its chunks are not well-formed HTTP") from None
    if request.content_length is None and len(raw) == request.max_content_length:
        raise RequestEntityTooLarge  # werkzeug cuts a body that comes in chunks at the limit, and says nothing
    return fields.read_json(model, raw)


def json_answer(model: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return the model as JSON, straight from its bytes."""
    body = model.model_dump_json().encode()
    return _Whole(body, status, {"Content-Length": str(len(body)), **(headers or {})}, content_type=JSON)


class _Whole(Response):
    """An answer that has all its headers already, so that werkzeug need not work them out for every request."""

    def get_wsgi_headers(self, _environ: object) -> Headers:
        return self.headers


def _environ_names(model: type[Header]) -> dict[str, str]:
    """Return how WSGI calls each header of a model, with the name it has in the model."""
    aliases = (field.alias or name for name, field in model.model_fields.items())
    return {"HTTP_" + alias.upper().replace("-", "_"): alias for alias in aliases}


def _read(model: type[Query], values: dict[str, str] | None) -> Query:
    return fields.read(model, values) if values else _empty(model)


@functools.cache
def _empty(model: type[Query]) -> Query:
    return fields.read(model, {})
