from __future__ import annotations

import pytest
from flask.testing import FlaskClient

from common.broker import Broker
from common.cards import ModelView, QueueDepth, WorkerCard
from common.settings import load_settings
from gateway.app import create_app
from tests.servers import free_port
from tests.unit.gateway.fake_worker import FakeWorker


@pytest.fixture
def away() -> FlaskClient:
    """A gateway whose Redis is not there."""
    settings = load_settings({"redis_url": f"redis://127.0.0.1:{free_port()}/0", "models": ("simulated",)})
    return create_app(settings, Broker(settings, patience_s=0.1)).test_client()


def test_queues_with_their_depth(client: FlaskClient, worker: FakeWorker) -> None:
    assert client.get("/api/queue").get_json() == {"queues": []}
    for priority in ("high", "normal", "normal"):
        client.post("/api/submit", json={"prompt": "x", "priority": priority})
    worker.take()
    rows = [QueueDepth.model_validate(row) for row in client.get("/api/queue").get_json()["queues"]]
    assert [(row.name, row.queued, row.running) for row in rows] == [
        ("simulated.high.default", 0, 1),
        ("simulated.normal.default", 2, 0),
    ]
    assert rows[0].oldest_age_seconds is None and rows[1].oldest_age_seconds is not None


def test_workers_as_they_describe_themselves(client: FlaskClient, worker: FakeWorker) -> None:
    assert client.get("/api/workers").get_json() == {"workers": []}
    card = worker.beat()
    (row,) = client.get("/api/workers").get_json()["workers"]
    assert WorkerCard.model_validate_json(WorkerCard.model_validate(row, strict=False).model_dump_json()) == card


def test_models_with_their_limits_and_workers(client: FlaskClient, worker: FakeWorker) -> None:
    worker.beat(models=["simulated"])
    rows = [ModelView.model_validate(row) for row in client.get("/api/models").get_json()["models"]]
    assert [(row.name, row.default, row.workers) for row in rows] == [("simulated", True, 1), ("pico", False, 0)]
    assert (rows[1].min_side, rows[1].max_side, rows[1].size_multiple) == (64, 256, 16)


@pytest.mark.parametrize("path", ["/api/queue", "/api/workers", "/api/models", "/api/tasks", "/api/status/" + "0" * 32])
def test_without_redis_everything_is_unavailable_for_now(away: FlaskClient, path: str) -> None:
    answer = away.get(path)
    assert (answer.status_code, answer.get_json(force=True)["code"]) == (503, "redis_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
