from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient
from structlog.testing import capture_logs

from gateway import docs, requestlog


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[None]:
    """The logger is bound once a process; a test that captures wants it bound anew."""
    requestlog._log.cache_clear()
    yield
    requestlog._log.cache_clear()


@pytest.mark.parametrize("given", ["r-1", "A.b_c-9", "x" * 64])
def test_a_well_formed_request_id_is_kept(client: FlaskClient, given: str) -> None:
    assert client.get("/api/templates", headers={"X-Request-ID": given}).headers.getlist("X-Request-ID") == [given]


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "ä", "a/b", '"'])
def test_any_other_is_replaced(client: FlaskClient, given: str) -> None:
    own = client.get("/api/templates", headers={"X-Request-ID": given}).headers["X-Request-ID"]
    assert re.fullmatch("[0-9a-f]{16}", own)


@pytest.mark.parametrize("path", ["/api/templates", "/nowhere", "/api/status/x", "/docs", "/docs/assets/none"])
def test_every_answer_has_an_id_and_what_protects_its_reader(client: FlaskClient, path: str) -> None:
    headers = client.get(path).headers
    assert headers["X-Request-ID"]
    for name, value in requestlog.PROTECTION:
        own = name == "Content-Security-Policy" and path == "/docs"
        assert headers.getlist(name) == [docs.POLICY if own else value]


def test_a_line_says_what_was_asked_and_never_what_was_sent(client: FlaskClient) -> None:
    with capture_logs() as logs:
        sent = client.post("/api/submit", json={"prompt": "a secret"}, headers={"X-Request-ID": "r-1"})
        client.get(f"/api/status/{sent.get_json()['task_id']}?wait=0&token=secret")
        client.get("/secret")
    first, second, third = logs
    assert first["event"] == "request"
    assert (first["request_id"], first["method"], first["route"]) == ("r-1", "POST", "/api/submit")
    assert (first["status"], first["task_id"]) == (202, sent.get_json()["task_id"])
    assert first["duration_ms"] > 0
    assert (second["route"], second["task_id"]) == ("/api/status/<task_id>", first["task_id"])
    assert (third["route"], third["status"]) == (None, 404)
    assert "secret" not in json.dumps(logs)


@pytest.mark.parametrize("given", ["f" * 65, "zfk_0123456789ab_" + "0" * 64, "a secret"])
def test_what_is_no_tasks_id_is_not_logged(client: FlaskClient, given: str) -> None:
    with capture_logs() as logs:
        client.get(f"/api/status/{given}")
    assert "task_id" not in logs[0]


def test_the_id_goes_with_the_task(client: FlaskClient, broker: object) -> None:
    from common.broker import Broker

    assert isinstance(broker, Broker)
    sent = client.post("/api/submit", json={"prompt": "x"}, headers={"X-Request-ID": "r-7"}).get_json()
    record = broker.view(sent["task_id"])
    assert record is not None
    assert record.request_id == "r-7"
