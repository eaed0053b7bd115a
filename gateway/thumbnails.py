"""Small pictures for lists: of a task's first picture, made when somebody asks for it."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict

from flask import Response, request
from flask_openapi3.types import ResponseDict
from PIL import Image

from common.errors import NotStored, RedisUnavailable, StorageError, TaskExpired, TooBusy, UnknownImage, UnknownTask
from common.schemas import ImageRef
from common.storage.base import BaseStorage
from gateway import problems
from gateway.admission import caller
from gateway.api import Api, TaskPath
from gateway.aside import Threads
from gateway.tasks import Tasks

SIDE = 256  # pixels of the longer one
QUALITY = 75
KEPT_BYTES = 8 << 20  # of thumbnails in each process; one has some 6 KiB
CACHED = {"Cache-Control": "private, max-age=31536000, immutable"}

making = Threads(2, patience_s=20.0)  # a page of a list asks for many at once


class Thumbnails:
    """One process's thumbnails. Those that were made last are kept for others who ask."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def of(self, image: ImageRef) -> bytes:
        """Return a WebP file of the picture; raises TaskExpired when it is no longer stored, StorageError, TooBusy."""
        with self._lock:
            if (kept := self._kept.get(image.key)) is not None:
                self._kept.move_to_end(image.key)
                return kept
        try:
            data = self._storage.read(image.key)
        except NotStored:
            raise TaskExpired("the picture is not in storage any more") from None
        made = making.run(self._make, data)
        with self._lock:
            self._bytes += len(made) - len(self._kept.pop(image.key, b""))
            self._kept[image.key] = made
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return made

    @staticmethod
    def _make(data: bytes) -> bytes:
        try:
            return shrunk(data)
        except Exception:  # Pillow's plugins raise whatever a broken file makes them stumble over
            raise StorageError("the stored picture cannot be read") from None


def shrunk(data: bytes) -> bytes:
    """Return a picture's file as a WebP of at most SIDE pixels on each side, without metadata."""
    with Image.open(io.BytesIO(data)) as image:
        image.thumbnail((SIDE, SIDE))
        small = image.convert("RGB")
    small.info = {}
    out = io.BytesIO()
    small.save(out, "WEBP", quality=QUALITY)
    return out.getvalue()


def create(tasks: Tasks, thumbnails: Thumbnails) -> Api:
    """Return the route of the thumbnails."""
    api = Api("thumbnails", __name__, about="Small pictures for lists.")
    refusals = (UnknownTask, UnknownImage, TaskExpired, StorageError, TooBusy, RedisUnavailable)
    described: ResponseDict = {
        "200": {"description": "A WebP file.", "content": {"image/webp": {}}},
        "304": {"description": "The thumbnail that the client has already."},
        **problems.documented(*refusals),
    }

    @api.get("/api/tasks/<task_id>/thumbnail", responses=described)
    def thumbnail(path: TaskPath) -> Response:
        """Fetch a task's first picture, at most 256 pixels wide and high. It never changes."""
        record = tasks.find(path.task_id, caller())
        if not record.images:
            raise UnknownImage(f"the task is {record.status} and has no picture")
        image = record.images[0]
        answer = Response(mimetype="image/webp", headers=CACHED)
        answer.set_etag(f"{image.sha256[:32]}-{SIDE}")
        if not request.if_none_match.contains(answer.get_etag()[0] or ""):
            answer.data = thumbnails.of(image)
            return answer
        answer.status_code = 304
        return answer

    return api
