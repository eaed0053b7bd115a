"""What a request's body says: JSON, a form with files beside it, or a picture as it is.

A body that may hold pictures is large. A few are in memory at once, and others wait for their turn.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, get_origin

from flask import request
from pydantic import BaseModel, PrivateAttr, WithJsonSchema
from werkzeug.datastructures import FileStorage, MultiDict
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge, RequestTimeout
from werkzeug.formparser import MultiPartParser

from common.errors import FieldError, InvalidRequest, TooBusy, UnsupportedMediaType
from common.schemas import PICTURES_JSON_MAX_BYTES
from gateway import fields
from gateway.aside import decoding

JSON = "application/json"
FORM = "multipart/form-data"
PICTURES = ("image/png", "image/jpeg", "image/webp")

JSON_LIMIT_BYTES = 1 << 20  # twice the largest request without pictures; more would only hold up others
MAX_MARKS = 100_000  # of JSON's punctuation in one that is larger than that, as it has long strings, not many
MAX_PARTS = 16  # of a form
READS_AT_ONCE = 4
READ_TURN_S = 20.0  # the longest that a large body waits; Nginx waits 30 s for us to read on

Parts = tuple[MultiDict[str, str], MultiDict[str, FileStorage]]  # a form's texts and its files, by name
FilePart = Annotated[bytes, WithJsonSchema({"type": "string", "format": "binary"})]

_turns = threading.BoundedSemaphore(READS_AT_ONCE)


class Form(BaseModel):
    """Base of what a form's parts are: `request`, the JSON of the other fields, and files named like fields.

    In the request as it is read, a file stands as `sha256:…`, and is found under that name in `files`.
    """

    _files: dict[str, bytes] = PrivateAttr(default_factory=dict)

    @property
    def files(self) -> Mapping[str, bytes]:
        return self._files

    @classmethod
    def file_parts(cls) -> list[str]:
        return [name for name in cls.model_fields if name != "request"]

    def add(self, data: bytes) -> str:
        """Take in a file and return what it is called."""
        name = digest(data)
        self._files[name] = data
        return name


def digest(data: bytes) -> str:
    """Return what two files share exactly when they are the same."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def read_json(model: type[fields.M], limit: int = JSON_LIMIT_BYTES) -> fields.M:
    """Return the request's body; raises UnsupportedMediaType, MalformedBody and InvalidRequest.

    A body that does not say what it is counts as JSON. One that says it is a form or plain text is refused, as that is
    what a foreign web page can send without the browser's asking first.
    """
    said = request.environ.get("CONTENT_TYPE", "")
    if said and said != JSON and not request.is_json:
        raise UnsupportedMediaType("the body must be JSON; send the header Content-Type: application/json")
    raw = _read(limit)
    if len(raw) <= JSON_LIMIT_BYTES:
        return fields.read_json(model, raw)
    if sum(raw.count(mark) for mark in b',:"[{') > MAX_MARKS:
        raise fields.malformed(f"the body is larger than {JSON_LIMIT_BYTES} bytes, and not by its pictures")
    return decoding.run(fields.read_json, model, raw)


@contextmanager
def turn() -> Iterator[None]:
    """Wait until there is room for this request's body, if it may be large; raises TooBusy when that takes too long."""
    length = request.content_length
    if length is not None and length <= JSON_LIMIT_BYTES:
        yield
        return
    if not _turns.acquire(timeout=READ_TURN_S):
        raise TooBusy("too many pictures arrive at once; send it again a little later")
    try:
        yield
    finally:
        _turns.release()


def read_with_files(model: type[fields.M], form: type[Form]) -> tuple[fields.M, Form]:
    """Return the request's body, which is JSON, a form, or, where that has a single file, this file itself.

    Raises UnsupportedMediaType, MalformedBody and InvalidRequest.
    """
    files = form.model_construct()
    kind, names = request.mimetype, form.file_parts()
    if kind == FORM:
        return _read_form(model, files), files
    if len(names) == 1:
        if kind in PICTURES:
            return fields.read(model, {names[0]: files.add(_read())}), files
        if kind and not request.is_json:
            raise UnsupportedMediaType(f"the body must be a file as {', '.join(PICTURES)}, or JSON, or {FORM}")
    return read_json(model, PICTURES_JSON_MAX_BYTES), files


def _read(limit: int | None = None) -> bytes:
    """Return the body's bytes, of which there may be so many, and no more than the settings allow."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":  # a few bytes could become gigabytes
        raise UnsupportedMediaType("the body must not be compressed; send it without Content-Encoding")
    limits = [bound for bound in (limit, request.max_content_length) if bound is not None]
    request.max_content_length = min(limits, default=None)
    try:
        raw = request.get_data(cache=False)
    except HTTPException as error:
        if isinstance(error.__context__, TimeoutError):  # slowclients.py's; werkzeug takes it for a hang-up
            raise RequestTimeout from None
        raise
    except Exception:  # gunicorn has some ten kinds of its own for a body in broken chunks
        raise fields.malformed("the body broke off, or its chunks are not well-formed HTTP") from None
    if request.content_length is None and len(raw) == request.max_content_length:
        raise RequestEntityTooLarge  # werkzeug cuts a body that comes in chunks at the limit, and says nothing
    return raw


def read_parts(most: int) -> Parts:
    """Return the texts and the files of the request's body, a form of at most so many parts.

    Raises UnsupportedMediaType and MalformedBody.
    """
    if request.mimetype != FORM:
        raise UnsupportedMediaType(f"the body must be a form; send it as {FORM}")
    boundary = request.mimetype_params.get("boundary", "")
    if not boundary:
        raise UnsupportedMediaType(f"{FORM} must name its boundary")
    return decoding.run(_parts, _read(), boundary, most)


def _read_form(model: type[fields.M], form: Form) -> fields.M:
    texts, files = read_parts(MAX_PARTS)
    if "request" in type(form).model_fields and "request" not in texts and "request" not in files:
        raise InvalidRequest.field("request", "is required: a part with the JSON of prompt and the other fields")
    values, errors = _request_part(texts, files), []
    for name in [*texts, *files]:
        if name not in form.file_parts():
            errors.append(FieldError(name[: fields.MAX_LOC_CHARS], _unexpected(name, model, form)))
        elif name in texts:
            errors.append(FieldError(name, "must be a file; handles and base64 go into the part `request`"))
    if errors:
        raise InvalidRequest("; ".join(f"{loc}: {msg}" for loc, msg in errors), errors=errors)
    for name, found in files.lists():
        sent = [form.add(file.stream.read()) for file in found]
        values[name] = _joined(name, model, values.get(name), sent)
    return fields.read(model, values)


def _parts(raw: bytes, boundary: str, most: int) -> Parts:
    """Return the texts and the files of a form; raises MalformedBody."""
    in_memory: Any = lambda **_: io.BytesIO()  # noqa: E731 - werkzeug's own way is a file on a disk that may be full
    parser = MultiPartParser(in_memory, max_form_memory_size=JSON_LIMIT_BYTES, max_form_parts=most)
    try:
        texts, files = parser.parse(io.BytesIO(raw), boundary.encode("latin-1"), len(raw))
    except RequestEntityTooLarge:
        limit = f"its text at most {JSON_LIMIT_BYTES} bytes"
        raise fields.malformed(f"a form has at most {most} parts, and {limit}") from None
    except ValueError:
        raise fields.malformed("the form is not well-formed, or breaks off") from None
    if None in texts or None in files:
        raise fields.malformed("every part of a form must have a name")
    return texts, files


def _request_part(texts: MultiDict[str, str], files: MultiDict[str, FileStorage]) -> dict[str, Any]:
    """Take the part `request` out of a form, whether it came as a text or as a file; return its fields."""
    found = [text.encode("utf-8", "replace") for text in texts.poplist("request")]
    found += [file.stream.read() for file in files.poplist("request")]
    if len(found) > 1:
        raise InvalidRequest.field("request", "must be there once")
    if not found:
        return {}
    if len(found[0]) > JSON_LIMIT_BYTES:
        raise InvalidRequest.field("request", f"must have at most {JSON_LIMIT_BYTES} bytes; send pictures as files")
    return fields.read_object(found[0])


def _unexpected(name: str, model: type[BaseModel], form: Form) -> str:
    if name in model.model_fields:
        return "goes into the part `request`, which is JSON"
    return f"unknown part; known are request, {', '.join(form.file_parts())}"


def _joined(name: str, model: type[BaseModel], given: Any, sent: list[str]) -> Any:
    """Return a field's value from what `request` has of it and the files that were sent."""
    if get_origin(model.model_fields[name].annotation) is list:
        return [*(given if isinstance(given, list) else [] if given is None else [given]), *sent]
    if given is not None or len(sent) > 1:
        raise InvalidRequest.field(name, "must be given once")
    return sent[0]
