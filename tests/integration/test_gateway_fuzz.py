"""Whatever a client sends, the answer is a task or a problem: never a 5xx, never a half-made task."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.broker import Broker
from common.problem import Problem
from common.schemas import GenerateRequest, SubmitAnswer
from common.settings import Settings
from gateway.app import create_app

MANY = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=3),
    max_leaves=8,
)
plausible: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=50),
    "negative_prompt": st.text(max_size=50) | st.none(),
    "model": st.sampled_from(["simulated", "pico", "turbo", "", "../x"]),
    "width": st.integers(-16, 4096) | st.sampled_from([64, 128, 256]),
    "height": st.integers() | st.sampled_from([64, 128, 256]),
    "steps": st.integers(-1, 200),
    "guidance_scale": st.floats(-1, 21),
    "seed": st.integers(-1, 2**53),
    "n": st.integers(-1, 10),
    "format": st.sampled_from(["webp", "png", "jpeg", "gif"]),
    "quality": st.integers(-1, 101),
    "priority": st.sampled_from(["high", "normal", "low", "urgent"]),
    "template": st.none() | st.text(max_size=70),
    "deadline_s": st.floats(-1, 90_000),
    "metadata": st.dictionaries(st.text(max_size=70), st.text(max_size=20), max_size=18),
}
assert plausible.keys() == GenerateRequest.model_fields.keys()
field = st.sampled_from(sorted(plausible)).flatmap(lambda name: st.tuples(st.just(name), plausible[name] | anything))
bodies = st.lists(field, max_size=6).map(dict).map(lambda body: {"prompt": "x"} | body) | anything


@pytest.fixture
def client(settings: Settings, broker: Broker) -> FlaskClient:
    roomy = settings.model_copy(update={"queue_cap": 10**6})
    return create_app(roomy, Broker(roomy)).test_client()


def judge(client: FlaskClient, broker: Broker, raw: bytes, content_type: str = "application/json") -> None:
    before = broker.pending()
    answer = client.post("/api/submit", data=raw, content_type=content_type)
    if answer.status_code == 202:
        made = SubmitAnswer.model_validate_json(answer.data)
        record = broker.view(made.task_id)
        assert record is not None
        assert broker.pending() == before + 1
        assert client.get(made.status_url).status_code == 200
        broker.cancel(made.task_id, "default")
    else:
        problem = Problem.model_validate_json(answer.data)
        assert 400 <= problem.status < 500, problem
        assert problem.errors
        assert broker.pending() == before


@MANY
@given(body=bodies)
def test_any_json(client: FlaskClient, broker: Broker, body: Any) -> None:
    judge(client, broker, json.dumps(body).encode())


@MANY
@given(raw=st.binary(max_size=200))
def test_any_bytes(client: FlaskClient, broker: Broker, raw: bytes) -> None:
    judge(client, broker, raw)


@MANY
@given(body=bodies, cut=st.integers(0, 400), junk=st.binary(max_size=8))
def test_any_broken_json(client: FlaskClient, broker: Broker, body: Any, cut: int, junk: bytes) -> None:
    raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    judge(client, broker, raw[:cut] + junk + raw[cut:])


@MANY
@given(
    path=st.sampled_from(["/api/status/{}", "/api/tasks/{}/events", "/view/{}/0.webp", "/view/x/{}", "/{}"]),
    part=st.text(st.characters(codec="utf-8"), max_size=40),
    query=st.dictionaries(
        st.sampled_from(["wait", "limit", "cursor", "status", "x"]), st.text(max_size=10), max_size=3
    ),
)
def test_any_path_and_query(client: FlaskClient, path: str, part: str, query: dict[str, str]) -> None:
    answer = client.get(path.format(quote(part)), query_string=query)
    assert answer.status_code < 500 or answer.request.path == "/ready"  # there is no worker, and it says so
    if answer.status_code >= 400:
        assert Problem.model_validate_json(answer.data).status == answer.status_code


@MANY
@given(query=st.dictionaries(st.sampled_from(["limit", "cursor", "status", "x"]), st.text(max_size=30), max_size=3))
def test_any_list(client: FlaskClient, query: dict[str, str]) -> None:
    answer = client.get("/api/tasks", query_string=query)
    assert answer.status_code in (200, 422)
