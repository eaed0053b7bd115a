"""Whatever a client sends, the answer is a task or a problem: never a 5xx, never a half-made task."""

from __future__ import annotations

import base64
import io
import json
from typing import Any
from urllib.parse import quote

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.test import stream_encode_multipart

from common.broker import Broker
from common.problem import Problem
from common.schemas import InputImage, ResolvedRequest, SubmitAnswer
from common.settings import Settings
from gateway.app import create_app
from tests.fuzz.bodies import PICTURES, as_json, bodies, files, right, spoilt, spoilt_bodies
from tests.samples import encoded

MANY = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def client(settings: Settings, broker: Broker) -> FlaskClient:
    roomy = settings.model_copy(update={"queue_cap": 10**6})
    client = create_app(roomy, Broker(roomy)).test_client()
    assert client.post("/api/images", data=encoded(), content_type="image/png").status_code == 201  # there is storage
    return client


def judge(client: FlaskClient, broker: Broker, raw: bytes, content_type: str = "application/json") -> None:
    """A task that is what was asked for, or a problem that names what is wrong."""
    before = broker.pending()
    answer = client.post("/api/submit", data=raw, content_type=content_type)
    if answer.status_code == 202:
        made = SubmitAnswer.model_validate_json(answer.data)
        record = broker.view(made.task_id)
        assert record is not None
        assert broker.pending() == before + (not record.status.final), "a deadline may have passed by now"
        assert_as_sent(client, made, json.loads(raw))
        broker.cancel(made.task_id, "default")
    else:
        problem = Problem.model_validate_json(answer.data)
        assert answer.content_type == "application/problem+json"
        assert 400 <= problem.status == answer.status_code < 500, problem
        assert problem.errors
        assert broker.pending() == before


def assert_as_sent(client: FlaskClient, made: SubmitAnswer, body: dict[str, Any]) -> None:
    """Fail unless the status repeats every value that was sent; pictures have become handles."""
    status = client.get(made.status_url)
    assert status.status_code == 200
    shown = status.get_json()["request"]
    for name, value in body.items():
        if name == "prompt" and body.get("template") is not None:
            assert (value or "") in shown[name]
        elif name in PICTURES:
            assert bool(shown[name]) == bool(value), name
        elif value is not None and name in ResolvedRequest.model_fields:
            assert shown[name] == ({"events": ["ended"]} | value if name == "webhook" else value), name


@MANY
@given(body=bodies)
def test_any_json(client: FlaskClient, broker: Broker, body: Any) -> None:
    judge(client, broker, json.dumps(body).encode())


@MANY
@given(raw=st.binary(max_size=200))
def test_any_bytes(client: FlaskClient, broker: Broker, raw: bytes) -> None:
    judge(client, broker, raw)


@MANY
@given(body=spoilt_bodies())
def test_any_right_json_gone_wrong(client: FlaskClient, broker: Broker, body: Any) -> None:
    judge(client, broker, json.dumps(body).encode())


@settings(parent=MANY, max_examples=120)
@given(body=right)
def test_whatever_is_right_is_accepted_and_comes_back_as_it_was_sent(client: FlaskClient, body: Any) -> None:
    fields, pictures = body
    answer = client.post("/api/submit", json=as_json(fields, pictures))
    assert answer.status_code == 202, answer.text
    assert_as_sent(client, SubmitAnswer.model_validate_json(answer.data), fields | pictures)
    parts = {name: [(io.BytesIO(data), "x") for data in found] for name, found in pictures.items()}
    form: dict[str, Any] = {"request": json.dumps(fields)} | parts
    answer = client.post("/api/submit", data=form, content_type="multipart/form-data")
    assert answer.status_code == 202, answer.text
    assert_as_sent(client, SubmitAnswer.model_validate_json(answer.data), fields | pictures)


@MANY
@given(body=bodies, cut=st.integers(0, 400), junk=st.binary(max_size=8))
def test_any_broken_json(client: FlaskClient, broker: Broker, body: Any, cut: int, junk: bytes) -> None:
    raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    judge(client, broker, raw[:cut] + junk + raw[cut:])


def judge_upload(client: FlaskClient, **sent: Any) -> None:
    answer = client.post("/api/images", **sent)
    if answer.status_code == 201:
        made = InputImage.model_validate_json(answer.data)
        assert made.width * made.height > 0
    else:
        problem = Problem.model_validate_json(answer.data)
        assert 400 <= problem.status < 500, problem


@MANY
@given(data=files | spoilt | st.binary(max_size=100), kind=st.sampled_from(["image/png", "image/gif", "x"]))
def test_any_picture(client: FlaskClient, data: bytes, kind: str) -> None:
    judge_upload(client, data=data, content_type=kind)
    judge_upload(client, json={"image": base64.b64encode(data).decode()})


@MANY
@given(
    parts=st.dictionaries(
        st.sampled_from(["image", "request", "init_image", "reference_images", "x", ""]),
        st.lists(files | spoilt, min_size=1, max_size=3) | st.text(max_size=20),
        max_size=3,
    ),
    cut=st.none() | st.integers(0, 2000),
)
def test_any_form(client: FlaskClient, parts: dict[str, Any], cut: int | None) -> None:
    data = {
        name: [(io.BytesIO(one), "x") for one in value] if isinstance(value, list) else value
        for name, value in parts.items()
    }
    stream, length, boundary = stream_encode_multipart(data)
    raw = stream.read(length if cut is None else cut)
    kind = f"multipart/form-data; boundary={boundary}"
    judge_upload(client, data=raw, content_type=kind)
    answer = client.post("/api/submit", data=raw, content_type=kind)
    assert answer.status_code < 500, answer.text


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
