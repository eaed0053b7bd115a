"""Small pictures of a task's first one."""

from __future__ import annotations

import io

import pytest
from flask.testing import FlaskClient
from PIL import Image

from common.broker import Broker
from common.records import Hold
from common.schemas import ImageRef
from common.settings import Settings
from common.storage import open_storage
from common.storage.base import BaseStorage
from gateway import thumbnails
from gateway.app import create_app
from tests.samples import drawn, encoded
from tests.unit.gateway.fake_worker import FakeWorker


def finish(worker: FakeWorker, client: FlaskClient, data: bytes, name: str = "one") -> str:
    """A task that was finished with this picture."""
    task_id = str(client.post("/api/submit", json={"prompt": "x"}).get_json()["task_id"])
    (task,) = worker.take()
    assert worker.storage is not None
    key = f"20260131/w1/{task_id}/{name}"
    worker.storage.put(key, data)
    image = ImageRef(key=key, width=1, height=1, format="webp", bytes=len(data), sha256=name * 20, seed=1)
    assert worker.broker.finish(worker.name, Hold(task.task_id, task.fence), "succeeded", images=[image]) == "ok"
    return task_id


@pytest.mark.parametrize(
    ("size", "kind", "mode", "small"),
    [
        ((1024, 512), "PNG", "RGB", (256, 128)),
        ((300, 900), "JPEG", "RGB", (85, 256)),
        ((64, 64), "WEBP", "RGB", (64, 64)),
        ((512, 512), "PNG", "RGBA", (256, 256)),
    ],
)
def test_it_is_the_picture_made_small(
    client: FlaskClient, worker: FakeWorker, size: tuple[int, int], kind: str, mode: str, small: tuple[int, int]
) -> None:
    task_id = finish(worker, client, encoded(drawn(*size, mode=mode), kind))
    answer = client.get(f"/api/tasks/{task_id}/thumbnail")
    assert (answer.status_code, answer.content_type) == (200, "image/webp")
    assert answer.headers["Cache-Control"] == "private, max-age=31536000, immutable"
    seen = Image.open(io.BytesIO(answer.data))
    assert (seen.format, seen.size, seen.mode) == ("WEBP", small, "RGB")
    (red, green, _), *_ = (seen.getpixel((2, 2)),)  # type: ignore[misc]
    assert red > 200 and green < 60
    again = client.get(f"/api/tasks/{task_id}/thumbnail", headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.data, again.headers["ETag"]) == (304, b"", answer.headers["ETag"])


def test_it_is_read_out_of_any_storage(
    settings: Settings, broker: Broker, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind Nginx, and where a picture is fetched by a link."""
    monkeypatch.setattr("common.storage.local.Storage.link", lambda *_: "https://elsewhere.example/x")
    client = create_app(settings.model_copy(update={"x_accel": "/results"}), broker).test_client()
    task_id = finish(worker, client, encoded())
    answer = client.get(f"/api/tasks/{task_id}/thumbnail")
    assert answer.status_code == 200 and answer.data.startswith(b"RIFF")
    assert "X-Accel-Redirect" not in answer.headers


def test_there_is_none_without_a_picture(client: FlaskClient, worker: FakeWorker) -> None:
    task_id = client.post("/api/submit", json={"prompt": "x"}).get_json()["task_id"]
    answer = client.get(f"/api/tasks/{task_id}/thumbnail")
    assert (answer.status_code, answer.get_json()["code"]) == (404, "unknown_image")
    client.post(f"/api/cancel/{task_id}")
    gone, broken = finish(worker, client, encoded(), "gone"), finish(worker, client, b"RIFF no picture", "broken")
    assert worker.storage is not None
    worker.storage.delete(f"20260131/w1/{gone}/gone")
    seen = [client.get(f"/api/tasks/{task}/thumbnail") for task in (gone, broken)]
    assert [(one.status_code, one.get_json()["code"]) for one in seen] == [
        (410, "task_expired"),
        (503, "storage_error"),
    ]


def test_what_was_made_last_is_kept(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    storage: BaseStorage = open_storage(settings)
    images = []
    for index in range(4):
        storage.put(f"20260131/w/{index}", encoded(drawn(400, 400)))
        images.append(ImageRef(key=f"20260131/w/{index}", width=1, height=1, format="png", bytes=1, sha256="0", seed=1))
    found = thumbnails.Thumbnails(storage)
    first = found.of(images[0])
    storage.delete(images[0].key)
    assert found.of(images[0]) == first
    monkeypatch.setattr(thumbnails, "KEPT_BYTES", 2 * len(first))
    for image in images[1:]:
        found.of(image)
    assert list(found._kept) == [images[2].key, images[3].key]
    assert found._bytes == 2 * len(first)
