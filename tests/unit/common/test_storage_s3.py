"""What is S3's alone; what every storage does is in tests/contract."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from common import storage
from common.errors import ConfigurationError, StorageError
from common.settings import load_settings
from common.storage.base import BaseStorage
from tests.s3server import BUCKET, SECRET, S3Server, show_credentials
from tests.servers import free_port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, S3Server(tmp_path_factory.mktemp("s3")) as running:
        show_credentials(patch)
        yield running


def opened(server: S3Server, **changes: str) -> BaseStorage:
    flags = {"storage": "s3", "s3_url": f"s3://{BUCKET}/a folder".replace(" ", "-"), "s3_endpoint": server.endpoint}
    return storage.open_storage(load_settings({**flags, **changes}))


def test_a_link_fetches_one_object_for_a_while_and_shows_no_secret(server: S3Server) -> None:
    store = opened(server)
    store.put("a/0.webp", b"one")
    store.put("a/1.webp", b"two")
    link = store.link("a/0.webp", 60)
    assert link is not None
    assert SECRET not in link
    answer = requests.get(link, timeout=10)
    assert (answer.status_code, answer.content, answer.headers["Content-Type"]) == (200, b"one", "image/webp")
    for forged in (link.replace("0.webp", "1.webp"), link.replace("Expires=60", "Expires=600"), link.split("?")[0]):
        assert requests.get(forged, timeout=10).status_code >= 400
    short = store.link("a/0.webp", 1)
    assert short is not None
    time.sleep(2.1)
    assert requests.get(short, timeout=10).status_code >= 400


def test_a_link_names_the_address_that_clients_reach(server: S3Server) -> None:
    link = opened(server, s3_public_endpoint="https://pictures.example").link("a/0.webp", 60)
    assert link is not None
    assert link.startswith(f"https://pictures.example/{BUCKET}/a-folder/a/0.webp?")


def test_two_folders_of_one_bucket_know_nothing_of_each_other(server: S3Server) -> None:
    one, other = opened(server), opened(server, s3_url=f"s3://{BUCKET}/a-folder-too")
    one.put("x/0.png", b"one")
    assert not other.exists("x/0.png")
    assert other.sweep(-60) == 0
    assert one.read("x/0.png") == b"one"


def test_more_than_a_thousand_objects_are_removed(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.storage.s3.DELETED_AT_ONCE", 3)
    store = opened(server, s3_url=f"s3://{BUCKET}/many")
    for k in range(7):
        store.put(f"a/{k}.png", b"x")
    store.remove("a")
    assert not any(store.exists(f"a/{k}.png") for k in range(7))


def test_a_wrong_key_is_said_to_be_one(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(StorageError, match="SignatureDoesNotMatch; look at the access key") as caught:
        opened(server).put("a/0.png", b"x")
    assert caught.value.retryable


def test_a_server_that_is_away_is_a_storage_error(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.storage.s3.TRIES", 1)
    store = opened(server, s3_endpoint=f"http://127.0.0.1:{free_port()}")
    for call in (store.check, lambda: store.read("a/0.png"), lambda: store.exists("a/0.png")):
        with pytest.raises(StorageError, match="ZFLEET_S3_ENDPOINT"):
            call()


def test_a_bucket_that_is_gone_is_no_empty_one(server: S3Server) -> None:
    with pytest.raises(StorageError, match="cannot reach the bucket"):
        opened(server, s3_url="s3://nowhere").exists("a/0.png")


@pytest.mark.parametrize(
    ("status", "head", "body"),
    [
        (302, {"Location": "/elsewhere"}, b""),
        (200, {"Last-Modified": "yesterday"}, b"x"),
        (200, {}, b"<ListBucketResult><Contents><Size>1</Size></Contents></ListBucketResult>"),
        (200, {"Content-Length": "9"}, b"x"),
        (502, {}, b"<html>&nbsp;"),
    ],
    ids=["redirect", "date", "list", "cut off", "proxy"],
)
def test_what_answers_and_is_no_s3_is_a_storage_error(
    server: S3Server, status: int, head: dict[str, str], body: bytes
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | head).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
        store = opened(server, s3_endpoint=f"http://127.0.0.1:{other.server_port}")
        with pytest.raises(StorageError, match=r"^cannot (read|remove)"):
            (store.remove if b"<List" in body else store.read)("a")
        other.shutdown()


@pytest.mark.parametrize("url", ["https://b/x", "s3://", "s3://B/x", "s3://bucket/../x", "s3://bucket/a//b", "bucket"])
def test_what_is_no_bucket_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="must be a bucket"):
        load_settings({"s3_url": url})


def test_no_bucket_at_all_is_refused_by_its_settings_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs ZFLEET_S3_URL"):
        storage.open_storage(load_settings({"storage": "s3", "data_dir": tmp_path}))


def test_a_missing_library_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "common.storage.s3", raising=False)
    with pytest.raises(ConfigurationError, match=r"pip install 'zfleet\[s3\]'"):
        storage.open_storage(load_settings({"storage": "s3", "s3_url": "s3://bucket"}))
