"""One suite over every HTTP dialect: pure parse and render over the native task, no 5xx for what a client sends."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI

from common import registry
from common.broker import Broker
from common.settings import Settings
from gateway import dialects
from gateway.api import Api
from gateway.app import create_app


class Example(NamedTuple):
    """A dialect's call that makes one task for PROMPT, and what its status is."""

    path: str
    body: dict[str, Any]
    status: int


PROMPT = "a red circle, 红色的圆"
EXAMPLES = {"native": Example("/api/submit", {"prompt": PROMPT}, 202)}
JUNK = (b"", b"null", b"[]", b'"x"', b"{}", b"{", b"\xff", b"[" * 50_000, b'{"prompt": 5}', b'{"prompt": "\\ud800"}')

# What a dialect may not reach: it parses and renders, and leaves the rest to gateway.tasks and gateway.images.
FORBIDDEN = ("redis", "common.broker", "common.keys", "common.connection", "common.storage", "common.settings", "os")


@pytest.fixture(params=registry.discover(dialects))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def app(name: str, settings: Settings, broker: Broker) -> OpenAPI:
    """A gateway that speaks this dialect alone."""
    return create_app(settings.model_copy(update={"dialects": (name,)}), broker)


@pytest.fixture
def client(app: OpenAPI) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def example(name: str) -> Example:
    assert name in EXAMPLES, f"add an example of {name} to this suite"
    return EXAMPLES[name]


def own_calls(app: OpenAPI, settings: Settings, broker: Broker) -> dict[str, dict[str, Any]]:
    """The described calls that this dialect adds."""
    without = create_app(settings.model_copy(update={"dialects": ()}), broker)
    return {path: calls for path, calls in app.api_doc["paths"].items() if path not in without.api_doc["paths"]}


def test_its_module_makes_a_blueprint(name: str, app: OpenAPI) -> None:
    module = registry.load(dialects, name)
    assert module.__doc__
    assert any(
        isinstance(blueprint, Api) and blueprint.import_name == module.__name__ for blueprint in app.iter_blueprints()
    )


def test_every_call_is_described(app: OpenAPI, settings: Settings, broker: Broker) -> None:
    calls = own_calls(app, settings, broker)
    assert calls
    for path, methods in calls.items():
        for method, call in methods.items():
            assert call["summary"] and "default" in call["responses"], (method, path)


def test_it_reaches_for_nothing_behind_the_native_task(name: str) -> None:
    source = Path(str(dialects.__path__[0]), f"{name}.py").read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for found in names:
            assert not any(found == banned or found.startswith(f"{banned}.") for banned in FORBIDDEN), found


def test_its_example_makes_one_task(client: FlaskClient, broker: Broker, example: Example) -> None:
    answer = client.post(example.path, json=example.body)
    assert answer.status_code == example.status, answer.text
    (summary,), _ = broker.tasks("default", status=None, limit=5, before=None)
    record = broker.view(summary.task_id)
    assert record is not None
    assert record.request.prompt == PROMPT
    assert record.request_id == answer.headers["X-Request-ID"]


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: str(junk)[:24])
def test_junk_is_refused_and_makes_no_task(client: FlaskClient, broker: Broker, example: Example, junk: bytes) -> None:
    answer = client.post(example.path, data=junk, content_type="application/json")
    assert 400 <= answer.status_code < 500, answer.text
    json.loads(answer.data)
    assert broker.pending() == 0


def test_an_unknown_id_is_no_5xx_on_any_route(
    client: FlaskClient, app: OpenAPI, settings: Settings, broker: Broker
) -> None:
    for path, methods in own_calls(app, settings, broker).items():
        for method in methods:
            for one in ("x", "0" * 32, "%00", "%2e%2e", "x" * 3000, "%F0%9F%8E%A8"):
                filled = "/".join(one if part.startswith("{") else part for part in path.split("/"))
                assert client.open(filled, method=method.upper()).status_code < 500, (method, filled)


def test_a_full_queue_is_told_with_when_to_come_back(settings: Settings, name: str, example: Example) -> None:
    tight = settings.model_copy(update={"dialects": (name,), "queue_cap": 1})
    client = create_app(tight, Broker(tight)).test_client()
    assert client.post(example.path, json=example.body).status_code == example.status
    answer = client.post(example.path, json=example.body)
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) > 0


def test_all_dialects_can_be_spoken_at_once(settings: Settings, broker: Broker) -> None:
    everything = create_app(settings.model_copy(update={"dialects": registry.discover(dialects)}), broker)
    assert everything.api_doc["paths"]
