from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient

from common import tracing
from common.broker import Broker
from tests.collector import Collector

PARENT = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
PROMPT = {"prompt": "a secret"}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Traces go there once tracing is closed."""
    with Collector() as collector:
        for name, value in collector.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(tracing, "_spans", None)
        tracing.configure("gateway")
        yield collector
        tracing.close()


def test_only_requests_for_a_task_are_told(client: FlaskClient, collector: Collector) -> None:
    task_id = client.post("/api/submit", json=PROMPT, headers=PARENT).json["task_id"]  # type: ignore[index]
    client.get(f"/api/status/{task_id}", headers=PARENT)
    client.post(f"/api/cancel/{task_id}", headers=PARENT)
    assert client.post("/api/submit", json=PROMPT | {"width": 8_000_000}, headers=PARENT).status_code == 422
    tracing.close()
    made, refused = collector.spans
    assert (made.name, made.attributes["zfleet.task_id"], made.failed) == ("POST /api/submit", task_id, False)
    assert (refused.attributes["http.response.status_code"], refused.failed) == (422, False)
    assert "zfleet.task_id" not in refused.attributes
    assert {span.parent_id for span in collector.spans} == {PARENT["traceparent"][36:52]}
    assert "secret" not in repr(collector.spans)


def test_without_a_clients_trace_each_task_begins_its_own(
    client: FlaskClient, broker: Broker, collector: Collector
) -> None:
    ids = [client.post("/api/submit", json=PROMPT).json["task_id"] for _ in range(2)]  # type: ignore[index]
    found = [broker.traced(task_id) for task_id in ids]
    tracing.close()
    carried = [f"00-{span.trace_id}-{span.span_id}" for span in collector.spans]
    assert [one.traceparent[:-3] for one in found if one] == carried
    assert len({span.trace_id for span in collector.spans}) == 2


def test_a_fault_here_is_an_error_of_the_span(
    client: FlaskClient, broker: Broker, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(broker, "submit", fail)
    assert client.post("/api/submit", json=PROMPT).status_code == 500
    tracing.close()
    (span,) = collector.spans
    assert (span.failed, span.attributes["error.type"]) == (True, "500")
