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
from common.schemas import GenerateRequest, InputImage, SubmitAnswer
from common.settings import Settings
from gateway.app import create_app
from tests.samples import encoded, lying_png

MANY = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=3),
    max_leaves=8,
)
files = st.sampled_from([encoded(kind=kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")] + [lying_png(9999, 9999)])
spoilt = st.tuples(files, st.integers(0, 400), st.binary(max_size=6)).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :])
sent = st.one_of(files, spoilt).map(lambda data: base64.b64encode(data).decode()) | st.sampled_from(
    ["img_" + "0" * 32, "img_", "data:image/png;base64,", "sha256:0"]
)
plausible: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=50),
    "negative_prompt": st.text(max_size=50) | st.none(),
    "model": st.sampled_from(["simulated", "pico", "turbo", "", "../x"]),
    "width": st.integers(-16, 4096) | st.sampled_from([64, 128, 256]),
    "height": st.integers() | st.sampled_from([64, 128, 256]),
    "steps": st.integers(-1, 200),
    "guidance_scale": st.floats(-1, 21),
    "cfg_normalization": st.floats(-1, 11),
    "cfg_truncation": st.floats(-1, 2),
    "init_image": sent,
    "strength": st.floats(-1, 2),
    "mask_image": sent,
    "control_image": sent,
    "control_scale": st.floats(-1, 3),
    "reference_images": st.lists(sent, max_size=5),
    "loras": st.lists(st.fixed_dictionaries({"name": st.sampled_from(["ink", "../x", ""]), "scale": st.floats(-5, 5)})),
    "preview": st.booleans(),
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
    client = create_app(roomy, Broker(roomy)).test_client()
    assert client.post("/api/images", data=encoded(), content_type="image/png").status_code == 201  # there is storage
    return client


def judge(client: FlaskClient, broker: Broker, raw: bytes, content_type: str = "application/json") -> None:
    before = broker.pending()
    answer = client.post("/api/submit", data=raw, content_type=content_type)
    if answer.status_code == 202:
        made = SubmitAnswer.model_validate_json(answer.data)
        record = broker.view(made.task_id)
        assert record is not None
        assert broker.pending() == before + (not record.status.final), "a deadline may have passed by now"
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
