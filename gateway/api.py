"""Blueprints whose calls are described in /openapi.json by their own annotations, and answers made from wire models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from flask import Response, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.data_type import DataType
from flask_openapi3.models.media_type import MediaType
from flask_openapi3.models.request_body import RequestBody
from flask_openapi3.models.schema import Schema
from flask_openapi3.models.tag import Tag
from flask_openapi3.utils import parse_form
from pydantic import BaseModel, ConfigDict, Field
from werkzeug.datastructures import Headers

from gateway import bodies, described, fields, problems
from gateway.bodies import JSON, Form
from gateway.described import Documented

F = TypeVar("F", bound=Callable[..., Any])

NO_STORE = {"Cache-Control": "no-store"}


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

    One that names a `form` beside its `body` is given the same body out of a form, too, with the files that came along.
    flask-openapi3 draws the description from the same annotations. It would also read the request, but builds each
    model's JSON schema anew to do so, and parses bodies in a way that cannot tell no JSON from JSON `null`.

    Who may call it, and every error that comes before the view is reached, is described beside what the view answers.
    An API whose errors have a form of its own says by `documented` how they are described; see problems.documented.
    """

    def __init__(
        self, name: str, import_name: str, *, about: str, documented: Documented = problems.documented
    ) -> None:
        self._documented = documented
        super().__init__(name, import_name, abp_tags=[Tag(name=name, description=about)])

    def get(self, rule: str, **options: Any) -> Callable[[F], F]:
        """Register a call."""

        def decorate(func: F) -> F:
            super(Api, self).get(rule, **described.whole(func, options, self._documented))(func)
            return func

        return decorate

    def post(self, rule: str, **options: Any) -> Callable[[F], F]:
        """Register a call, and describe its form beside its JSON: flask-openapi3 knows of one or the other."""

        def decorate(func: F) -> F:
            super(Api, self).post(rule, **described.whole(func, options, self._documented))(func)
            if form := get_type_hints(func).get("form"):
                self._describe(rule, form)
            return func

        return decorate

    def takes_form(self, rule: str, form: type[BaseModel]) -> None:
        """Describe the form that a registered call reads by itself."""
        parts, schemas = parse_form(form)
        self.components_schemas.update(schemas)
        self.paths[rule].post.requestBody = RequestBody(content=parts, required=True)

    def _describe(self, rule: str, form: type[Form]) -> None:
        parts, schemas = parse_form(form)
        self.components_schemas.update(schemas)
        content = self.paths[rule].post.requestBody.content
        content.update(parts)
        if len(form.file_parts()) == 1:
            file = MediaType(schema=Schema(type=DataType.STRING, format="binary"))
            content.update(dict.fromkeys(bodies.PICTURES, file))

    @staticmethod
    def create_view_func(
        func: Callable[..., Response],
        header: type[Header] | None,
        cookie: Any,
        path: type[BaseModel] | None,
        query: type[Query] | None,
        form: type[Form] | None,
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
            if body is not None and form is not None:
                with bodies.turn():
                    given["body"], given["form"] = bodies.read_with_files(body, form)
                    return func(**given)
            if body is not None:
                given["body"] = bodies.read_json(body)
            return func(**given)

        return view


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
