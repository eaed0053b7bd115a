"""Whom each route is open to, of all that there are."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI

from common.apikeys import ApiKey, Token
from common.broker import Broker

PUBLIC = {"/health", "/ready", "/openapi.json", "/docs", "/docs/start.js", "/docs/assets/<path:name>"}


def calls(app: OpenAPI) -> Iterator[tuple[str, str, str, str]]:
    """Yield each call as its rule, a method, a path, and whom it is open to."""
    for rule in app.url_map.iter_rules():
        arguments = dict.fromkeys(rule.arguments, "x")
        _, path = rule.build(arguments) or ("", rule.rule)
        scope = getattr(app.view_functions[rule.endpoint], "scope", "tenant")
        for method in (rule.methods or set()) - {"OPTIONS", "HEAD"}:
            yield rule.rule, method, path, scope


def test_every_route_wants_a_key_unless_it_says_that_it_is_public(app: OpenAPI, broker: Broker) -> None:
    _token(broker)
    client = app.test_client()
    for rule, method, path, scope in calls(app):
        answer = client.open(path, method=method)
        assert (scope == "public") == (rule in PUBLIC), rule
        if scope == "public":
            assert answer.status_code != 401, rule
        else:
            assert (answer.status_code, answer.get_json()["code"]) == (401, "unauthenticated"), rule


def test_what_is_for_admins_is_refused_to_tenants(app: OpenAPI, broker: Broker) -> None:
    shown = {"Authorization": f"Bearer {_token(broker)}"}
    client: FlaskClient = app.test_client()
    asked = [(method, path) for _, method, path, scope in calls(app) if scope == "admin"]
    assert asked
    for method, path in asked:
        assert client.open(path, method=method, headers=shown).status_code == 403, path


def _token(broker: Broker) -> Token:
    token = Token.new()
    broker.put_key(ApiKey(key_id=token.key_id, tenant="acme", digest=token.digest, created_at=datetime.now(UTC)))
    return token
