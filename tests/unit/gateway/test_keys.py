"""API keys over HTTP: what `zfleet keys` does, for keys with the admin scope."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI
from werkzeug.test import TestResponse

from common.apikeys import Token, proves
from common.broker import Broker
from common.errors import KeyNotActive
from common.settings import Settings
from gateway.app import create_app
from tests.tenants import bearer, new_key
from tests.unit.gateway.test_admission import forget


@pytest.fixture
def admin(broker: Broker) -> dict[str, str]:
    return bearer(new_key(broker, "operators", admin=True))


def make(client: FlaskClient, shown: dict[str, str], **fields: object) -> TestResponse:
    return client.post("/api/keys", json={"tenant": "acme"} | fields, headers=shown)


def listed(client: FlaskClient, admin: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {key["key_id"]: key for key in client.get("/api/keys", headers=admin).get_json()["keys"]}


def test_a_key_is_made_shown_once_and_works(client: FlaskClient, broker: Broker, admin: dict[str, str]) -> None:
    ends = (datetime.now(UTC) + timedelta(days=30)).isoformat()
    limits = {"priority_max": "normal", "rate": "10/s", "max_queued": 5, "max_running": 2, "share": 2.5}
    answer = make(client, admin, expires_at=ends, **limits)
    made = answer.get_json()
    assert (answer.status_code, answer.headers["Cache-Control"]) == (201, "no-store")
    token = Token.parse(made.pop("key"))
    assert token is not None and token.key_id == made["key_id"]
    assert made == made | limits | {"tenant": "acme", "admin": False, "state": "active", "revoked_at": None}
    assert proves(token, broker.key(token.key_id)) and broker.shares() == {"acme": 2.5}
    assert client.get("/api/me", headers=bearer(str(token))).get_json()["tenant"] == "acme"
    seen = client.get("/api/keys", headers=admin)
    assert token.secret not in seen.text and token.digest not in seen.text
    assert listed(client, admin)[token.key_id] == made


def test_one_is_revoked(client: FlaskClient, app: OpenAPI, admin: dict[str, str], monkeypatch: Any) -> None:
    made = make(client, admin).get_json()
    gone = client.post(f"/api/keys/{made['key_id']}/revoke", headers=admin).get_json()
    assert gone["state"] == listed(client, admin)[made["key_id"]]["state"] == "revoked"
    forget(app, monkeypatch)
    assert client.get("/api/me", headers=bearer(made["key"])).status_code == 401


def test_one_is_rotated_and_goes_on_for_a_while(client: FlaskClient, broker: Broker, admin: dict[str, str]) -> None:
    made = make(client, admin, rate="3/m", max_running=1).get_json()
    path = f"/api/keys/{made['key_id']}/rotate"
    fresh = client.post(path, json={"grace_s": 3600}, headers=admin).get_json()
    assert fresh["key_id"] != made["key_id"] and (fresh["rate"], fresh["max_running"]) == ("3/m", 1)
    assert listed(client, admin)[made["key_id"]]["state"] == "retiring"
    for key in (made, fresh):
        assert client.get("/api/me", headers=bearer(key["key"])).status_code == 200
    again = client.post(path, json={}, headers=admin)
    assert (again.status_code, again.get_json()["code"]) == (409, "key_not_active")
    last = client.post(f"/api/keys/{fresh['key_id']}/rotate", json={}, headers=admin).get_json()
    assert listed(client, admin)[fresh["key_id"]]["state"] == "revoked"
    assert broker.key(last["key_id"]) is not None


def test_rotations_at_once_make_one_key(client: FlaskClient, broker: Broker, admin: dict[str, str]) -> None:
    made, begin = make(client, admin).get_json()["key_id"], threading.Barrier(8)

    def rotate(_: int) -> str:
        begin.wait()
        try:
            return broker.rotate_key(made, timedelta(0), at=datetime.now(UTC)).key.key_id
        except KeyNotActive:
            return ""

    with ThreadPoolExecutor(8) as pool:
        fresh = set(pool.map(rotate, range(8))) - {""}
    assert len(fresh) == 1
    assert len(listed(client, admin)) == 3, "the admin's, the old one and the new one"


def test_one_that_lasts_to_the_end_of_time_is_rotated(client: FlaskClient, admin: dict[str, str]) -> None:
    made = make(client, admin, expires_at="9999-12-31T23:59:59-12:00").get_json()
    fresh = client.post(f"/api/keys/{made['key_id']}/rotate", json={}, headers=admin)
    assert fresh.status_code == 200
    assert fresh.get_json()["expires_at"].startswith("9999-12-31T23:59:59")


@pytest.mark.parametrize(
    ("fields", "loc"),
    [
        ({"tenant": "A b"}, "tenant"),
        ({"rate": "10"}, "rate"),
        ({"max_queued": 0}, "max_queued"),
        ({"max_running": True}, "max_running"),
        ({"admin": "yes"}, "admin"),
        ({"share": "1"}, "share"),
        ({"expires_at": 4e9}, "expires_at"),
        ({"expires_at": "4000000000"}, "expires_at"),
        ({"share": 0}, "share"),
        ({"share": 101}, "share"),
        ({"priority_max": "urgent"}, "priority_max"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2120-01-01T00:00:00"}, "expires_at"),
        ({"digest": "0" * 64}, "digest"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_made(
    client: FlaskClient, broker: Broker, admin: dict[str, str], fields: dict[str, object], loc: str
) -> None:
    answer = make(client, admin, **fields)
    assert answer.status_code == 422
    assert [error["loc"] for error in answer.get_json()["errors"]] == [loc]
    assert len(broker.all_keys()) == 1


def test_an_unknown_one_is_not_there(client: FlaskClient, admin: dict[str, str]) -> None:
    for key_id in ("0123456789ab", "x", str(Token.new())):
        for order, body in (("revoke", None), ("rotate", {})):
            answer = client.post(f"/api/keys/{key_id}/{order}", json=body, headers=admin)
            assert (answer.status_code, answer.get_json()["code"]) == (404, "unknown_key")
            assert key_id not in answer.text or len(key_id) < 13


def test_they_are_for_admins(client: FlaskClient, broker: Broker) -> None:
    key = bearer(new_key(broker))
    for method, path in (("GET", ""), ("POST", ""), ("POST", "/0123456789ab/revoke"), ("POST", "/0123456789ab/rotate")):
        assert client.open(f"/api/keys{path}", method=method, json={"tenant": "a"}, headers=key).status_code == 403
        assert client.open(f"/api/keys{path}", method=method, json={"tenant": "a"}).status_code == 401
    assert len(broker.all_keys()) == 1


# The first key


def test_the_first_is_an_admins_made_from_here(client: FlaskClient, broker: Broker) -> None:
    refused = make(client, {})
    assert (refused.status_code, refused.get_json()["errors"][0]["loc"]) == (422, "admin")
    assert not broker.guarded()
    made = make(client, {}, admin=True)
    assert made.status_code == 201
    assert make(client, {}, admin=True).status_code == 401, "though this gateway may not have looked since"
    assert make(client, bearer(made.get_json()["key"])).status_code == 201


@pytest.mark.parametrize("headers", [{"X-Forwarded-For": "192.0.2.7"}, {"X-Real-IP": "192.0.2.7"}, {"Forwarded": "x"}])
def test_it_is_never_made_from_elsewhere(settings: Settings, broker: Broker, headers: dict[str, str]) -> None:
    """Not even where everybody is served without a key."""
    client = create_app(settings.model_copy(update={"insecure": True}), broker).test_client()
    assert make(client, headers, admin=True).status_code == 403
    elsewhere = {"REMOTE_ADDR": "192.0.2.7"}
    answer = client.post("/api/keys", json={"tenant": "a", "admin": True}, environ_overrides=elsewhere)
    assert (answer.status_code, answer.get_json()["code"]) == (403, "forbidden")
    assert not broker.guarded()
    assert make(client, {}, admin=True).status_code == 201
