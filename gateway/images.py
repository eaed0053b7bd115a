"""Finished pictures over HTTP: by Nginx, by a link into the storage, or sent from here."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import quote

from flask import Response, send_file
from flask_openapi3.types import ResponseDict
from pydantic import BaseModel, Field

from common.errors import (
    Forbidden,
    InvalidRequest,
    NotStored,
    RedisUnavailable,
    StorageError,
    TaskExpired,
    Unauthenticated,
    UnknownImage,
    UnknownTask,
)
from common.schemas import ImageRef, TaskRecord
from common.settings import Settings
from common.storage.base import BaseStorage
from gateway import problems
from gateway.admission import Doorkeeper, open_to
from gateway.api import NO_STORE, Api, Query
from gateway.links import BEARER, Links
from gateway.tasks import NO_SUCH_TASK, Tasks

LINK_S = 300  # a link into the storage is good for so many seconds

_NAME = re.compile(r"(0|[1-9][0-9]{0,3})\.([a-z]{3,4})")


class ImagePath(BaseModel):
    """One picture of a task."""

    task_id: str
    name: str = Field(description="The picture's number from 0, and its format.")


class Images:
    """The pictures of tasks, as answers, as URLs and as bytes."""

    def __init__(self, storage: BaseStorage, settings: Settings) -> None:
        self._storage = storage
        self._x_accel = settings.x_accel

    @staticmethod
    def url(task_id: str, index: int, image: ImageRef) -> str:
        """Return the path where `send` answers with this picture."""
        return f"/view/{task_id}/{index}.{image.format}"

    @staticmethod
    def find(record: TaskRecord, name: str) -> ImageRef:
        """Return the picture of this task that the last part of a URL names; raises UnknownImage."""
        match = _NAME.fullmatch(name)
        index = int(match[1]) if match else len(record.images)
        if match is None or index >= len(record.images) or record.images[index].format != match[2]:
            raise UnknownImage(f"the task is {record.status} and has no picture of that name")
        return record.images[index]

    def read(self, image: ImageRef) -> bytes:
        """Return the picture's bytes; raises StorageError."""
        return self._storage.read(image.key)

    def send(self, record: TaskRecord, image: ImageRef, *, redirect: bool = True) -> Response:
        """Return the answer that brings the picture to the client; raises TaskExpired when it is no longer stored.

        Without `redirect` it comes by way of this host even from a storage that could send it.
        """
        link = self._storage.link(image.key, LINK_S) if redirect else None
        if link:
            return Response(status=302, headers={"Location": link, **NO_STORE})
        mimetype = f"image/{image.format}"
        cached = {"Cache-Control": f"private, max-age={_seconds_left(record)}, immutable"}
        if self._x_accel and self._storage.path(image.key):
            target = self._x_accel.rstrip("/") + "/" + quote(image.key)
            return Response(status=200, headers={"X-Accel-Redirect": target, **cached}, mimetype=mimetype)
        answer = self._from_here(image, mimetype)
        answer.headers.update(cached)
        return answer

    def _from_here(self, image: ImageRef, mimetype: str) -> Response:
        path = self._storage.path(image.key)
        try:
            source = io.BytesIO(self._storage.read(image.key)) if path is None else path
            if path and not self._storage.exists(image.key):
                raise NotStored("the picture is not in storage")
        except NotStored:
            raise TaskExpired("the picture is not in storage any more") from None
        return send_file(source, mimetype=mimetype, etag=image.sha256, conditional=True)


class LinkQuery(Query):
    """What a link has that works without an API key."""

    expires: str = Field("", description="Seconds since 1970.")
    via: Literal["gateway"] | None = Field(None, description="Sent from here, with no redirect to the storage.")
    signature: str | None = Field(None, description="Of the path and `expires`; such a link is good, or nobody's.")


def create(tasks: Tasks, images: Images, links: Links, doorkeeper: Doorkeeper) -> Api:
    """Return the route of the pictures, which every dialect's answers point to."""
    api = Api("images", __name__, about="Finished pictures.")
    described: ResponseDict = {
        "200": {"description": "The picture.", "content": {"image/*": {}}},
        "302": {"description": "A link into the storage, good for five minutes."},
        "304": {"description": "The picture that the client has already."},
        **problems.documented(
            InvalidRequest,
            Unauthenticated,
            Forbidden,
            UnknownTask,
            UnknownImage,
            TaskExpired,
            StorageError,
            RedisUnavailable,
        ),
    }

    @api.get("/view/<task_id>/<name>", responses=described)
    @open_to("public")
    def view(path: ImagePath, query: LinkQuery) -> Response:
        """Fetch a picture. Its URL stands in the task's status, and wants the key; a signed link wants none.

        The picture never changes.
        """
        if query.signature is None:
            record = tasks.find(path.task_id, doorkeeper.identify())
        elif links.proves(f"/view/{path.task_id}/{path.name}", query.expires, query.signature):
            record = tasks.find(path.task_id, BEARER)
        else:
            raise UnknownTask(NO_SUCH_TASK)
        answer = images.send(record, images.find(record, path.name), redirect=query.via is None)
        if query.signature is not None:
            answer.headers["Cross-Origin-Resource-Policy"] = "cross-origin"  # it is there to be shown on other pages
        return answer

    return api


def _seconds_left(record: TaskRecord) -> int:
    """Return for how long the picture can still be fetched."""
    if record.expires_at is None:
        return 0
    return max(0, int((record.expires_at - datetime.now(UTC)).total_seconds()))
