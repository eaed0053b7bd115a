"""Whom a gateway without keys answers: this machine's own programs and pages, and nobody who only says so."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from flask.testing import FlaskClient

from common.apikeys import ApiKey, Token
from common.broker import Broker
from common.settings import Settings
from gateway.app import create_app


def asked(client: FlaskClient, headers: Mapping[str, str], peer: str = "127.0.0.1") -> int:
    return client.get("/api/tasks", headers=headers, environ_base={"REMOTE_ADDR": peer}).status_code


@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client-IP", "True-Client-IP"])
@pytest.mark.parametrize("said", ["127.0.0.1", "::1", "for=127.0.0.1"])
def test_a_header_makes_no_stranger_local(client: FlaskClient, name: str, said: str) -> None:
    assert asked(client, {name: said}, peer="203.0.113.9") == 401
    assert asked(client, {name: said}, peer="::ffff:203.0.113.9") == 401


@pytest.mark.parametrize("said", ["203.0.113.9", "127.0.0.1, 203.0.113.9", "203.0.113.9, 127.0.0.1", "unknown", "x"])
def test_who_was_passed_on_for_a_stranger_is_one(client: FlaskClient, said: str) -> None:
    assert asked(client, {"X-Forwarded-For": said}) == 401
    assert asked(client, {"X-Forwarded-For": "127.0.0.1"}) == 200


def test_a_scheme_or_host_that_is_passed_on_changes_nothing(client: FlaskClient) -> None:
    said = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example", "X-Forwarded-Prefix": "/evil"}
    answer = client.post("/api/submit", json={"prompt": "x", "model": "simulated"}, headers=said)
    assert answer.status_code == 202
    assert "evil" not in answer.get_data(as_text=True) + str(answer.headers)


@pytest.mark.parametrize(
    ("host", "insecure", "status"),
    [
        ("localhost", False, 200), ("127.0.0.1:8080", False, 200), ("[::1]", False, 200),
        ("gateway.example:8080", False, 200), ("other.example", False, 403), ("10.0.0.1", False, 403),
        ("gateway", False, 403), ("localhost.evil.example", False, 403), ("a b", False, 403), ("", False, 403),
        ("10.0.0.1", True, 200), ("gateway", True, 200), ("other.example", True, 403), ("[fd00::1]:80", True, 200),
    ],
)  # fmt: skip
def test_a_host_is_this_machines_or_the_configured_one(
    settings: Settings, broker: Broker, host: str, insecure: bool, status: int
) -> None:
    own = settings.model_copy(update={"url": "https://gateway.example", "insecure": insecure})
    assert asked(create_app(own, broker).test_client(), {"Host": host}) == status


def test_who_shows_a_key_may_come_from_anywhere(client: FlaskClient, broker: Broker) -> None:
    """A page that was given a key is the key's own business; no other page has one."""
    token = Token.new()
    broker.put_key(ApiKey(key_id=token.key_id, tenant="acme", digest=token.digest, created_at=datetime.now(UTC)))
    page = {"Host": "other.example", "Origin": "https://app.example"}
    assert asked(client, page | {"Authorization": f"Bearer {token}"}, peer="203.0.113.9") == 200
    assert asked(client, page) in (401, 403)
