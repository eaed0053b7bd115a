"""One suite over every HTTP dialect: pure parse and render over the native task, no 5xx for what a client sends."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI
from werkzeug.test import TestResponse

from common import registry
from common.broker import Broker
from common.problem import Problem
from common.settings import Settings
from gateway import dialects
from gateway.api import Api
from gateway.app import close, create_app
from tests.tenants import bearer, new_key


class Example(NamedTuple):
    """A dialect's call that makes one task for PROMPT and answers at once, and what its status is.

    `refused` returns the code of an error in the dialect's own form; `bad` are fields that make the call one.
    """

    path: str
    body: dict[str, Any]
    status: int
    refused: Callable[[TestResponse], str]
    bad: Sequence[dict[str, Any]]


def problem(answer: TestResponse) -> str:
    """RFC 9457, of the native dialect."""
    assert answer.content_type == "application/problem+json"
    found = Problem.model_validate_json(answer.data)
    assert found.status == answer.status_code and found.detail
    return found.code


def openai_error(answer: TestResponse) -> str:
    assert answer.content_type == "application/json"
    (error,) = answer.get_json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] == "invalid_request_error"
    assert answer.headers.get("X-Should-Retry", "false") == ("true" if "Retry-After" in answer.headers else "false")
    return str(error["code"])


PROMPT = "a red circle, 红色的圆"
BAD: tuple[dict[str, Any], ...] = (
    {"prompt": ""}, {"prompt": " "}, {"prompt": None}, {"prompt": "x\0"}, {"prompt": "x" * 16_001}, {"model": "nope"},
    {"model": "m" * 5000}, {"n": 0}, {"n": 99}, {"n": "x"}, {"seed": -1}, {"seed": 2**60}, {"steps": 10**9},
    {"priority": "urgent"}, {"deadline_s": 0}, {"guidance_scale": 1e300}, {"metadata": {"": ""}}, {"webhook": "x"},
)  # fmt: skip
SIZES: tuple[dict[str, Any], ...] = ({"width": 1}, {"height": 10**9}, {"format": "bmp"}, {"quality": 0}, {"hue": 1})
THEIRS: tuple[dict[str, Any], ...] = (
    {"size": "1x1"}, {"size": "big"}, {"size": "99999x99999"}, {"output_format": "gif"}, {"background": "transparent"},
    {"output_compression": 101}, {"partial_images": 4}, {"quality": "best"}, {"response_format": "url"}, {"n": 2},
    {"user": "x" * 513},
)  # fmt: skip
EXAMPLES = {
    "native": Example("/api/submit", {"prompt": PROMPT}, 202, problem, BAD + SIZES),
    "openai": Example("/v1/images/generations", {"prompt": PROMPT, "stream": True}, 200, openai_error, BAD + THEIRS),
}
JUNK = (b"", b"null", b"[]", b'"x"', b"{}", b"{", b"\xff", b"[" * 50_000, b'{"prompt": 5}', b'{"prompt": "\\ud800"}')

# What a dialect may not reach: it parses and renders, and leaves the rest to gateway.tasks and gateway.images.
FORBIDDEN = ("redis", "common.broker", "common.keys", "common.connection", "common.storage", "common.settings", "os")


@pytest.fixture(params=registry.discover(dialects))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def app(described_once: None, name: str, settings: Settings, broker: Broker) -> Iterator[OpenAPI]:
    """A gateway that speaks this dialect alone."""
    app = create_app(settings.model_copy(update={"dialects": (name,)}), broker)
    yield app
    close(app)


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
    folder = Path(str(dialects.__path__[0]))
    for source in (folder / f"{name}.py", *folder.glob(f"_{name}_*.py")):
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
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
    assert example.refused(answer)
    assert broker.pending() == 0


def test_bad_fields_are_refused_in_its_own_form_and_make_no_task(
    client: FlaskClient, broker: Broker, example: Example
) -> None:
    for fields in example.bad:
        answer = client.post(example.path, json=example.body | fields)
        assert 400 <= answer.status_code < 500, (str(fields)[:80], answer.status_code)
        assert example.refused(answer)
    assert broker.pending() == 0


def test_what_http_itself_refuses_has_its_own_form_too(client: FlaskClient, example: Example) -> None:
    wrong_method = client.delete(example.path)
    assert (wrong_method.status_code, example.refused(wrong_method)) == (405, "method_not_allowed")
    assert "POST" in wrong_method.headers["Allow"]
    client.application.config["MAX_CONTENT_LENGTH"] = 100
    too_large = client.post(example.path, json=example.body | {"prompt": "x" * 200})
    assert (too_large.status_code, example.refused(too_large)) == (413, "body_too_large")
    nowhere = client.post(f"{example.path}/nowhere", json=example.body)
    assert (nowhere.status_code, example.refused(nowhere)) == (404, "not_found")
    text = client.post(example.path, data="x", content_type="text/plain")
    assert (text.status_code, example.refused(text)) == (415, "unsupported_media_type")


def filled(path: str, text: str) -> str:
    """A described path with this in the place of each of its parameters."""
    return "/".join(text if part.startswith("{") else part for part in path.split("/"))


def test_an_unknown_id_is_no_5xx_on_any_route(
    client: FlaskClient, app: OpenAPI, settings: Settings, broker: Broker, example: Example
) -> None:
    for path, methods in own_calls(app, settings, broker).items():
        for method in methods:
            for one in ("x", "0" * 32, "%00", "%2e%2e", "x" * 3000, "%F0%9F%8E%A8"):
                answer = client.open(filled(path, one), method=method.upper())
                assert answer.status_code < 500, (method, path, one)
                assert answer.status_code < 400 or example.refused(answer)


def test_without_a_good_key_nothing_is_answered(
    client: FlaskClient, app: OpenAPI, settings: Settings, broker: Broker, example: Example
) -> None:
    bearer(new_key(broker, "acme"))
    for path, methods in own_calls(app, settings, broker).items():
        for method in methods:
            for headers in ({}, {"Authorization": f"Bearer zfk_{'0' * 12}_{'0' * 64}"}):
                answer = client.open(filled(path, "0" * 32), method=method.upper(), headers=headers)
                assert answer.status_code == 401 and example.refused(answer), (method, path)
                assert answer.headers["WWW-Authenticate"].startswith("Bearer ")


def made(broker: Broker, tenant: str) -> list[str]:
    """The ids of a tenant's tasks."""
    return [task.task_id for task in broker.tasks(tenant, status=None, limit=50, before=None)[0]]


def test_another_tenants_task_is_like_none(
    client: FlaskClient, app: OpenAPI, settings: Settings, broker: Broker, example: Example
) -> None:
    mine, other = bearer(new_key(broker, "acme")), bearer(new_key(broker, "other"))
    assert client.post(example.path, json=example.body, headers=mine).status_code == example.status
    (task_id,) = made(broker, "acme")
    for path, methods in own_calls(app, settings, broker).items():
        for method in methods if "{" in path else ():
            known, unknown = (
                client.open(filled(path, one), method=method.upper(), headers=other) for one in (task_id, "0" * 32)
            )
            assert known.status_code == unknown.status_code
            assert known.data.replace(task_id.encode(), b"0" * 32) == unknown.data
    (record,) = [broker.view(task_id)]
    assert record is not None and record.tenant == "acme" and not record.cancel_requested


def test_an_idempotency_key_makes_one_task_for_each_tenant(
    client: FlaskClient, broker: Broker, example: Example
) -> None:
    mine, other = bearer(new_key(broker, "acme")), bearer(new_key(broker, "other"))
    key = {"Idempotency-Key": "the-same"}
    for headers in (mine, mine, other):
        assert client.post(example.path, json=example.body, headers=headers | key).status_code == example.status
    assert [len(made(broker, tenant)) for tenant in ("acme", "other")] == [1, 1]
    changed = client.post(example.path, json=example.body | {"seed": 5}, headers=mine | key)
    assert (changed.status_code, example.refused(changed)) == (409, "idempotency_conflict")
    broken = client.post(example.path, json=example.body, headers=mine | {"Idempotency-Key": "a b"})
    assert 400 <= broken.status_code < 500 and example.refused(broken)
    assert [len(made(broker, tenant)) for tenant in ("acme", "other")] == [1, 1]


def test_a_full_queue_is_told_with_when_to_come_back(settings: Settings, name: str, example: Example) -> None:
    tight = settings.model_copy(update={"dialects": (name,), "queue_cap": 1})
    client = create_app(tight, Broker(tight)).test_client()
    assert client.post(example.path, json=example.body).status_code == example.status
    answer = client.post(example.path, json=example.body)
    assert (answer.status_code, example.refused(answer)) == (429, "queue_full")
    assert int(answer.headers["Retry-After"]) > 0


def test_all_dialects_can_be_spoken_at_once(settings: Settings, broker: Broker) -> None:
    everything = create_app(settings.model_copy(update={"dialects": registry.discover(dialects)}), broker)
    assert everything.api_doc["paths"]
