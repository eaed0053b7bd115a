"""Links that need no key: good for an hour, for one picture, for whoever has them; everything else is no task."""

from __future__ import annotations

import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI

from common.broker import Broker
from common.settings import Settings
from gateway import links as module
from gateway.app import create_app
from gateway.links import LINK_S, Links
from tests.tenants import bearer, new_key
from tests.unit.gateway.fake_worker import PICTURE, FakeWorker


@pytest.fixture
def done(client: FlaskClient, broker: Broker, worker: FakeWorker) -> str:
    """A task with two pictures, of a tenant of a fleet that has keys."""
    client.post("/api/submit", json={"prompt": "x", "n": 2}, headers=bearer(new_key(broker, "acme")))
    return worker.work()


@pytest.fixture
def links(broker: Broker) -> Links:
    """Those of another process of the same fleet."""
    return Links(broker.shared_secret)


def link(app: OpenAPI, links: Links, path: str) -> str:
    with app.test_request_context():
        return links.url(path).removeprefix("http://localhost")


def refused(client: FlaskClient, path: str, **headers: str) -> tuple[int, str]:
    answer = client.get(path, headers=headers)
    assert answer.content_type == "application/problem+json"
    return answer.status_code, answer.get_json(force=True)["code"]


def test_a_link_brings_the_picture_to_anybody(app: OpenAPI, client: FlaskClient, links: Links, done: str) -> None:
    answer = client.get(link(app, links, f"/view/{done}/1.webp"))
    assert (answer.status_code, answer.data, answer.content_type) == (200, PICTURE, "image/webp")
    assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    etag = {"If-None-Match": answer.headers["ETag"]}
    assert client.get(link(app, links, f"/view/{done}/1.webp"), headers=etag).status_code == 304


def test_without_a_link_the_key_decides(client: FlaskClient, broker: Broker, done: str) -> None:
    path = f"/view/{done}/0.webp"
    assert refused(client, path) == (401, "unauthenticated")
    assert refused(client, path, **bearer(new_key(broker, "other"))) == (404, "unknown_task")
    answer = client.get(path, headers=bearer(new_key(broker, "acme")))
    assert (answer.status_code, answer.headers["Cross-Origin-Resource-Policy"]) == (200, "same-origin")
    assert client.get(path, headers=bearer(new_key(broker, "ops", admin=True))).status_code == 200


ALTERED: dict[str, Callable[[str], str]] = {
    "altered": lambda url: url[:-1] + ("0" if url[-1] != "0" else "1"),
    "cut": lambda url: url[:-1],
    "longer": lambda url: url + "0",
    "empty": lambda url: url.partition("&")[0] + "&signature=",
    "not ascii": lambda url: url.partition("&")[0] + "&signature=%F0%9F%8E%A8",
    "earlier": lambda url: url.replace("expires=", "expires=0"),
    "later": lambda url: url.replace("expires=1", "expires=2"),
    "other digits": lambda url: url.replace("expires=", "expires=%D9%A1"),
    "endless": lambda url: url.replace("expires=", "expires=" + "9" * 5000),
    "for ever": lambda url: url.partition("?")[0] + "?" + url.partition("&")[2],
    "another picture": lambda url: url.replace("/1.webp", "/0.webp"),
    "another name": lambda url: url.replace("/1.webp", "/01.webp"),
    "another task": lambda url: url.replace("/view/", f"/view/{'0' * 32}x"),
}


def test_any_other_link_is_like_an_unknown_task_even_to_the_owner(
    app: OpenAPI, client: FlaskClient, broker: Broker, links: Links, done: str
) -> None:
    owner = bearer(new_key(broker, "acme"))
    unknown = client.get(f"/view/{'0' * 32}/1.webp", headers=owner)
    for how, change in ALTERED.items():
        url = change(link(app, links, f"/view/{done}/1.webp"))
        assert refused(client, url) == (404, "unknown_task"), how
        assert refused(client, url, **owner) == (404, "unknown_task"), how
        assert client.get(url).data == unknown.data, how


def test_a_link_is_good_for_an_hour(
    app: OpenAPI, client: FlaskClient, links: Links, done: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, now = link(app, links, f"/view/{done}/0.webp"), time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + LINK_S - 2)
    assert client.get(url).status_code == 200
    monkeypatch.setattr(module.time, "time", lambda: now + LINK_S + 2)
    assert refused(client, url) == (404, "unknown_task")


def test_another_fleets_link_is_none(app: OpenAPI, client: FlaskClient, done: str) -> None:
    assert refused(client, link(app, Links(lambda _purpose: b"x" * 32), f"/view/{done}/0.webp"))[0] == 404


def test_a_link_does_not_make_a_picture_of_nothing(app: OpenAPI, client: FlaskClient, links: Links, done: str) -> None:
    assert refused(client, link(app, links, f"/view/{done}/2.webp")) == (404, "unknown_image")
    assert refused(client, link(app, links, f"/view/{'0' * 32}/0.webp")) == (404, "unknown_task")


def test_the_secret_is_asked_for_once_a_minute(app: OpenAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    links = Links(lambda purpose: bytes([len(asked)]) * 32 if not asked.append(purpose) else b"")  # type: ignore[func-returns-value]
    now = time.monotonic()
    first, second = (link(app, links, "/view/a/0.png") for _ in range(2))
    assert (first.partition("signature")[2], asked) == (second.partition("signature")[2], ["links"])
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 61)
    assert link(app, links, "/view/a/0.png").partition("signature")[2] != first.partition("signature")[2]
    assert asked == ["links"] * 2


@pytest.mark.parametrize(
    ("public_url", "peer", "headers", "origin"),
    [
        ("", "127.0.0.1", {}, "http://localhost"),
        ("", "127.0.0.1", {"Host": "fleet.example:8443", "X-Forwarded-Proto": "https"}, "https://fleet.example:8443"),
        ("", "::1", {"Host": "fleet.example", "X-Forwarded-Proto": "https"}, "https://fleet.example"),
        ("", "10.0.0.7", {"Host": "fleet.example", "X-Forwarded-Proto": "https"}, "http://fleet.example"),
        ("", "127.0.0.1", {"Host": "fleet.example", "X-Forwarded-Proto": "javascript"}, "http://fleet.example"),
        ("", "127.0.0.1", {"Host": 'x"><script>', "X-Forwarded-Proto": "https"}, ""),
        ("https://a.example/zf", "10.0.0.7", {"Host": "b.example"}, "https://a.example/zf"),
    ],
    ids=["plain", "nginx", "ipv6", "from afar", "no scheme", "no host", "set"],
)
def test_where_links_lead(
    settings: Settings, broker: Broker, public_url: str, peer: str, headers: dict[str, str], origin: str
) -> None:
    app = create_app(settings, broker)
    links = Links(broker.shared_secret, public_url)
    with app.test_request_context(headers=headers, environ_base={"REMOTE_ADDR": peer}):
        url = links.url("/view/a/0.png")
    assert url.partition("?")[0] == f"{origin}/view/a/0.png"
    assert urlsplit(url).query.startswith("expires=")
