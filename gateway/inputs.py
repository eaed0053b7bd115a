"""Pictures that clients send to start from: looked at, and stored before there is a task that names them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from flask import Response
from pydantic import Field

from common import inputs
from common.errors import (
    FieldError,
    FleetError,
    InvalidRequest,
    MalformedBody,
    StorageError,
    StorageFull,
    TooBusy,
    UnsupportedMediaType,
)
from common.schemas import InputImage, Picture, Wire
from common.settings import Settings
from common.storage.base import BaseStorage
from gateway import formats, pictures, problems
from gateway.admission import caller, submits
from gateway.api import NO_STORE, Api, json_answer
from gateway.aside import decoding
from gateway.bodies import FilePart, Form, digest
from gateway.diskguard import DiskGuard
from gateway.pictures import Unusable


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One picture of a request: its handle, its size in pixels, and what it is to the request's hash."""

    handle: str
    width: int
    height: int
    identity: str
    png: bytes = b""  # where it is still to be stored


class Inputs:
    """The pictures that clients send."""

    def __init__(self, storage: BaseStorage, disk: DiskGuard, settings: Settings) -> None:
        self._storage = storage
        self._disk = disk
        self._max_pixels = settings.input_max_pixels
        self._kept_for = timedelta(days=settings.retention_days)

    def upload(self, text: str, files: Mapping[str, bytes], *, field: str, tenant: str) -> InputImage:
        """Store one picture by itself, for this tenant; raises InvalidRequest, StorageFull, StorageError."""
        self._disk.check()
        try:
            data, made = decoding.run(self._read, text, files)
        except Unusable as error:
            raise InvalidRequest.field(field, str(error)) from None
        handle = inputs.new_handle(tenant)
        self._storage.put(inputs.storage_key(handle), made.png)
        return InputImage(
            handle=handle,
            width=made.width,
            height=made.height,
            format=made.format,
            bytes=len(data),
            expires_at=datetime.now(UTC) + self._kept_for,
        )

    def mask_of_holes(self, data: bytes, *, field: str) -> bytes:
        """Return a mask that is white where to paint from a file that is transparent there; raises InvalidRequest."""
        try:
            return decoding.run(pictures.mask_of_holes, data, self._max_pixels)
        except Unusable as error:
            raise InvalidRequest.field(field, str(error)) from None

    def look(
        self, named: Mapping[str, Sequence[str]], files: Mapping[str, bytes], tenant: str
    ) -> dict[str, list[Input]]:
        """Return the pictures of a request by field: those that have a handle, those in `files`, those in base64.

        Nothing is stored yet. Another tenant's handle is an unknown one. Raises InvalidRequest with an entry for each
        that cannot be used, and StorageError.
        """
        found: dict[str, list[Input]] = {}
        errors = []
        for field, texts in named.items():
            found[field] = []
            for index, text in enumerate(texts):
                try:
                    found[field].append(self._one(text, files, tenant))
                except Unusable as error:
                    loc = f"{field}.{index}" if field == "reference_images" else field
                    errors.append(FieldError(loc, str(error)))
        if errors:
            raise InvalidRequest("; ".join(f"{loc}: {msg}" for loc, msg in errors), errors=errors)
        return found

    def keep(self, found: Mapping[str, Sequence[Input]]) -> None:
        """Store what is not stored yet, and let the rest live as long as the task; raises StorageFull, StorageError."""
        try:
            for one in _each(found):
                key = inputs.storage_key(one.handle)
                if one.png:
                    self._storage.put(key, one.png)
                else:
                    self._storage.touch(key)
        except StorageError:
            self.drop(found)
            raise

    def drop(self, found: Mapping[str, Sequence[Input]]) -> None:
        """Remove what was stored for a task that did not come about."""
        for one in _each(found):
            if one.png:
                with contextlib.suppress(FleetError):  # a sweep will find it
                    self._storage.delete(inputs.storage_key(one.handle))

    def _one(self, text: str, files: Mapping[str, bytes], tenant: str) -> Input:
        if inputs.is_handle(text):
            return self._stored(text, tenant)
        data, made = decoding.run(self._read, text, files)
        handle = inputs.new_handle(tenant)
        return Input(handle=handle, width=made.width, height=made.height, identity=digest(data), png=made.png)

    def _read(self, text: str, files: Mapping[str, bytes]) -> tuple[bytes, pictures.Picture]:
        data = files[text] if text in files else pictures.from_text(text)
        return data, pictures.canonical(data, self._max_pixels)

    def _stored(self, handle: str, tenant: str) -> Input:
        key = inputs.storage_key(handle)
        if not self._storage.exists(key) or not inputs.belongs(handle, tenant):
            raise Unusable("is unknown here, or was not used for too long; send the picture again")
        head = formats.head(self._storage.head(key, formats.STORED_HEAD_BYTES))
        if head is None:
            raise Unusable("is stored, but cannot be read; send the picture again")
        return Input(handle=handle, width=head.width, height=head.height, identity=handle)


class Upload(Wire):
    """A picture to start from, in JSON."""

    image: Picture = Field(description="Base64 of a PNG, JPEG or WebP file, or a data: URL of one.")


class UploadForm(Form):
    """A picture to start from, in a form."""

    image: FilePart = Field(description="A PNG, JPEG or WebP file.")


def create(found: Inputs) -> Api:
    """Return the route that takes pictures in, for submits of every dialect."""
    api = Api("inputs", __name__, about="Pictures to start from.")
    refusals = (InvalidRequest, MalformedBody, UnsupportedMediaType, TooBusy, StorageFull, StorageError)

    @api.post("/api/images", responses={"201": InputImage, **problems.documented(*refusals)})
    @submits
    def upload(body: Upload, form: UploadForm) -> Response:
        """Send a picture to start from; a submit names it by the handle that comes back.

        It is kept upright and without its metadata. Of several frames the first counts; what is transparent is white.
        """
        made = found.upload(body.image, form.files, field="image", tenant=caller().tenant)
        return json_answer(made, 201, NO_STORE)

    return api


def _each(found: Mapping[str, Sequence[Input]]) -> list[Input]:
    return [one for several in found.values() for one in several]
