from __future__ import annotations

from pathlib import Path

import pytest
from flask.testing import FlaskClient

from common.broker import Broker
from common.settings import Settings
from common.storage import open_storage
from common.storage.base import BaseStorage
from gateway import app as module
from gateway.app import create_app
from tests.unit.gateway.fake_worker import PICTURE, FakeWorker


@pytest.fixture
def done(client: FlaskClient, worker: FakeWorker) -> str:
    """A task with two pictures."""
    client.post("/api/submit", json={"prompt": "x", "n": 2})
    return worker.work()


def code(client: FlaskClient, path: str) -> tuple[int, str]:
    answer = client.get(path)
    assert answer.content_type == "application/problem+json"
    return answer.status_code, answer.get_json(force=True)["code"]


def test_a_picture_is_sent(client: FlaskClient, done: str) -> None:
    answer = client.get(f"/view/{done}/1.webp")
    assert (answer.status_code, answer.data, answer.content_type) == (200, PICTURE, "image/webp")
    assert answer.headers["Cache-Control"].startswith("private, max-age=")
    assert answer.headers["Cache-Control"].endswith(", immutable")
    assert 6 * 86_400 < int(answer.headers["Cache-Control"].split("=")[1].split(",")[0]) <= 7 * 86_400


def test_a_picture_that_the_client_has_is_not_sent_again(client: FlaskClient, done: str) -> None:
    etag = client.get(f"/view/{done}/0.webp").headers["ETag"]
    again = client.get(f"/view/{done}/0.webp", headers={"If-None-Match": etag})
    assert (again.status_code, again.data) == (304, b"")


def test_a_part_of_a_picture_is_sent(client: FlaskClient, done: str) -> None:
    answer = client.get(f"/view/{done}/0.webp", headers={"Range": "bytes=0-3"})
    assert (answer.status_code, answer.data) == (206, PICTURE[:4])
    answer = client.get(f"/view/{done}/0.webp", headers={"Range": "bytes=9999-"})
    assert (answer.status_code, answer.content_type) == (416, "application/problem+json")


@pytest.mark.parametrize(
    "name",
    [
        "2.webp", "0.png", "0.jpg", "0", "00.webp", "-1.webp", "0.webp.webp", "+0.webp", "%D9%A0.webp", "0.WEBP",
        "..", "%2e%2e", "0.webp%00", "%00", "0%2ewebp%0a", "999999999999.webp", "x" * 3000,
    ],
)  # fmt: skip
def test_any_other_name_is_no_picture(client: FlaskClient, done: str, name: str) -> None:
    assert code(client, f"/view/{done}/{name}") == (404, "unknown_image")


@pytest.mark.parametrize(
    "path",
    [
        "/view/../../etc/passwd", "/view/%2e%2e/%2e%2e/etc/passwd", "/view/..%2f..%2fetc/passwd", "/view//etc/passwd",
        "/view/{}/../0.webp", "/view/{}/%2e%2e%2f0.webp", "/view/{}/..%5c0.webp", "/view/{}//0.webp", "/view/{}/",
        "//view/{}/0.webp", "/view/..;/0.webp", "/view/%252e%252e/0.webp", "/VIEW/{}/0.webp",
    ],
)  # fmt: skip
def test_no_path_leads_out(client: FlaskClient, done: str, path: str) -> None:
    status, _code = code(client, path.format(done))
    assert status == 404


def test_a_task_without_pictures_has_none(client: FlaskClient, worker: FakeWorker) -> None:
    task_id = client.post("/api/submit", json={"prompt": "x"}).get_json()["task_id"]
    assert code(client, f"/view/{task_id}/0.webp") == (404, "unknown_image")
    (task,) = worker.take()
    worker.fail(task)
    assert code(client, f"/view/{task_id}/0.webp") == (404, "unknown_image")
    assert code(client, f"/view/{'0' * 32}/0.webp") == (404, "unknown_task")


def test_a_picture_that_was_swept_is_expired(client: FlaskClient, done: str, settings: Settings) -> None:
    open_storage(settings).sweep(-60)
    assert code(client, f"/view/{done}/0.webp") == (410, "task_expired")


def test_a_results_folder_that_is_not_there_is_no_swept_picture(
    client: FlaskClient, done: str, settings: Settings
) -> None:
    settings.results_dir.rename(settings.results_dir.with_name("unmounted"))
    assert code(client, f"/view/{done}/0.webp") == (503, "storage_error")
    settings.results_dir.with_name("unmounted").rename(settings.results_dir)
    assert client.get(f"/view/{done}/0.webp").status_code == 200


def test_behind_nginx_it_sends_the_picture(settings: Settings, broker: Broker, done: str) -> None:
    client = create_app(settings.model_copy(update={"x_accel": "/_results/"}), broker).test_client()
    answer = client.get(f"/view/{done}/0.webp")
    assert (answer.status_code, answer.data, answer.content_type) == (200, b"", "image/webp")
    assert answer.headers["X-Accel-Redirect"] == f"/_results/20260131/w1/{done}/0.webp"
    assert "immutable" in answer.headers["Cache-Control"]


class Bucket(BaseStorage):
    """A storage without files."""

    linked = True

    def put(self, key: str, data: bytes) -> None: ...

    def read(self, key: str) -> bytes:
        return PICTURE

    def exists(self, key: str) -> bool:
        return True

    def delete(self, key: str) -> None: ...

    def remove(self, folder: str) -> None: ...

    def path(self, key: str) -> Path | None:
        return None

    def link(self, key: str, seconds: int) -> str | None:
        return f"https://bucket.example/{key}?for={seconds}" if self.linked else None

    def sweep(self, older_than_s: float) -> int:
        return 0


def test_a_storage_with_links_is_where_the_client_is_sent(
    settings: Settings, broker: Broker, done: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_storage", Bucket)
    answer = create_app(settings, broker).test_client().get(f"/view/{done}/0.webp")
    assert answer.status_code == 302
    assert answer.headers["Location"] == f"https://bucket.example/20260131/w1/{done}/0.webp?for=300"
    assert answer.headers["Cache-Control"] == "no-store"


def test_a_storage_with_neither_is_read_here(
    settings: Settings, broker: Broker, done: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_storage", Bucket)
    monkeypatch.setattr(Bucket, "linked", False)
    answer = create_app(settings, broker).test_client().get(f"/view/{done}/0.webp")
    assert (answer.status_code, answer.data) == (200, PICTURE)
    assert answer.headers["ETag"]
