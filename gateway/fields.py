"""Reads what a client sent into a model, and says in plain words what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common.errors import FieldError, InvalidRequest, MalformedBody

M = TypeVar("M", bound=BaseModel)

MAX_ERRORS = 32  # an answer names no more than this
TOO_MANY_ERRORS = 1000
MAX_LOC_CHARS = 100  # an unknown field's name is the client's own text
SECOND_LOOK_BYTES = 1_000_000  # larger bodies are not parsed again for the sake of a better message

_TYPES = {
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be an array",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "string_unicode": "must be valid Unicode; this has half of a surrogate pair",
}
_INTEGERS = frozenset({"int_type", "int_parsing", "int_from_float", "int_parsing_size"})
_NUMBERS = frozenset({"float_type", "float_parsing", "finite_number"})
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_RANGES = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})


def read_json(model: type[M], raw: bytes) -> M:
    """Return the JSON object `raw` as a model.

    Raises MalformedBody when it is no JSON object, and InvalidRequest with an entry for each field that is wrong.
    """
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        if error.error_count() == 1:
            (first,) = error.errors(include_url=False, include_input=False)
            if first["type"] == "json_invalid":
                return _second_look(model, raw, str(first["ctx"]["error"]))
        raise explain(error, model) from None


def read_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object `raw`, whose fields nobody has looked at yet; raises MalformedBody."""
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        raise malformed("the part `request` is not valid JSON") from None
    if not isinstance(values, dict):
        raise malformed("the part `request` must be a JSON object")
    return values


def read(model: type[M], values: Mapping[str, Any]) -> M:
    """Return `values` as a model; raises InvalidRequest with an entry for each one that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, model) from None


def explain(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """Return the error to answer with; what the client sent is in it by name only, never by value."""
    if error.error_count() > TOO_MANY_ERRORS:  # to list them would take longer than to read them
        raise malformed(f"the body has {error.error_count()} wrong or unknown fields; see /docs for those there are")
    found = []
    for one in error.errors(include_url=False, include_input=False)[:MAX_ERRORS]:
        if not one["loc"] and one["type"] in ("model_type", "dict_type"):
            return malformed('the body must be a JSON object, as in {"prompt": "a red circle"}')
        found.append(FieldError(_place(one["loc"]), _message(model, one)))
    return InvalidRequest("; ".join(f"{loc}: {msg}" for loc, msg in found), errors=found)


def malformed(message: str) -> MalformedBody:
    """Return the error for a body that is not a JSON object."""
    return MalformedBody(message, errors=[FieldError("body", message)])


def _second_look(model: type[M], raw: bytes, reason: str) -> M:
    """Parse again with the standard library, which lets through what is one field's fault, such as a lone surrogate.

    What it cannot parse either, or not without running out of stack or digits, is a malformed body for `reason`.
    """
    if not raw.strip():
        raise malformed("the body is empty; send a JSON object")
    try:
        values = json.loads(raw) if len(raw) <= SECOND_LOOK_BYTES else None
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        return read(model, values)
    raise malformed(f"the body is not valid JSON: {reason}")


def _place(loc: tuple[int | str, ...]) -> str:
    """Return `metadata.key` for ("metadata", "key", "[key]"), fit for JSON and of a bounded length."""
    dotted = ".".join(str(part) for part in loc if part != "[key]") or "body"
    return dotted[:MAX_LOC_CHARS].encode("utf-8", "replace").decode()


def _message(model: type[BaseModel], one: Mapping[str, Any]) -> str:
    kind, ctx = one["type"], one.get("ctx", {})
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        within = _model(model, one["loc"][:-1]) or model
        return f"unknown field; known are {', '.join(within.model_fields)}"
    if kind in _INTEGERS or kind in _NUMBERS or kind in _RANGES:
        return _number(model, one)
    if kind in ("literal_error", "enum"):
        return f"must be {ctx['expected']}"
    if kind == "string_too_long":
        return f"must have at most {ctx['max_length']} characters"
    if kind == "string_too_short":
        return "must not be empty" if ctx["min_length"] == 1 else f"must have at least {ctx['min_length']} characters"
    if kind == "too_long":
        return f"must have at most {ctx['max_length']} entries"
    if kind == "value_error":
        return str(ctx["error"])
    return _TYPES.get(kind, "is not valid")


def _number(model: type[BaseModel], one: Mapping[str, Any]) -> str:
    """Return the sort of number and the range that the field's declaration asks for."""
    sort = " an integer" if one["type"] in _INTEGERS else " a number" if one["type"] in _NUMBERS else ""
    field = _field(model, one["loc"])
    return f"must be{sort} {_range(field.metadata if field else ())}".rstrip()


def _field(model: type[BaseModel], loc: Sequence[int | str]) -> FieldInfo | None:
    """Return the declaration of the field at this place."""
    within = _model(model, loc[:-1])
    fields = {field.alias or name: field for name, field in within.model_fields.items()} if within else {}
    return fields.get(str(loc[-1])) if loc else None


def _model(model: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel] | None:
    """Return the model that what stands at this place is read into; None where it is no model."""
    within: type[BaseModel] | None = model
    keyed = False  # whether the next part is a key of an object that has any
    for name in (part for part in loc if isinstance(part, str)):
        if keyed:
            keyed = False
            continue
        field = within.model_fields.get(name) if within else None
        within = next(_models(field.annotation), None) if field else None
        keyed = field is not None and get_origin(field.annotation) is dict
    return within


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _range(constraints: Iterable[Any]) -> str:
    """Return `from 1 to 100`, `above 0 and at most 10` …, or nothing where there is no limit."""
    bound = {name: getattr(part, name) for part in constraints for name in _BOUNDS if hasattr(part, name)}
    if {"ge", "le"} <= bound.keys():
        return f"from {bound['ge']} to {bound['le']}"
    return " and ".join(f"{word} {bound[name]}" for name, word in _BOUNDS.items() if name in bound)
