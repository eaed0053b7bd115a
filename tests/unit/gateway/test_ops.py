from __future__ import annotations

import pytest
from flask.testing import FlaskClient

from common.broker import Broker
from common.cards import GpuReading, Health, ModelView, QueueDepth, WorkerCard
from common.settings import Settings, load_settings
from gateway import ops
from gateway.app import create_app
from gateway.diskguard import DiskGuard
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


def test_no_templates_yet(client: FlaskClient) -> None:
    assert client.get("/api/templates").get_json() == {"templates": []}


def test_health_without_a_worker_is_degraded(client: FlaskClient) -> None:
    client.post("/api/submit", json={"prompt": "x"})
    answer = client.get("/health")
    found = Health.model_validate_json(answer.data)
    assert (answer.status_code, found.status, found.reasons) == (200, "degraded", ["no worker is alive"])
    assert (found.pending_tasks, found.workers) == (1, 0)
    assert found.uptime_seconds >= 0


def test_health_with_a_worker(client: FlaskClient, broker: Broker, worker: FakeWorker) -> None:
    worker.beat()
    FakeWorker(broker, name="w2").beat(gpu=GpuReading(name="H200", index=1, memory_used_mb=500), models_loaded=["pico"])
    FakeWorker(broker, name="w3").beat(gpu=None)
    found = Health.model_validate_json(client.get("/health").data)
    assert (found.status, found.reasons, found.workers) == ("healthy", [], 3)
    assert found.gpu_memory_used_mb == 1500
    assert found.models_loaded == ["pico", "simulated"]


def test_a_lost_gpu_degrades_the_fleet_and_is_no_worker(
    client: FlaskClient, broker: Broker, worker: FakeWorker
) -> None:
    lost = FakeWorker(broker, name="host.gpu1.lost")
    lost.beat(state="lost", device="cuda:1", gpu=None, models=[], capacity=0)
    found = Health.model_validate_json(client.get("/health").data)
    assert (found.status, found.workers) == ("degraded", 0)
    assert found.reasons == ["GPUs lost: 1; see /api/workers", "no worker is alive"]
    assert client.get("/ready").status_code == 503
    worker.beat()
    found = Health.model_validate_json(client.get("/health").data)
    assert (found.status, found.workers, len(found.reasons)) == ("degraded", 1, 1)
    assert client.get("/ready").status_code == 200


def test_a_model_that_no_worker_serves_is_told(client: FlaskClient, worker: FakeWorker) -> None:
    worker.beat(models=["simulated"])
    found = Health.model_validate_json(client.get("/health").data)
    assert (found.status, found.reasons) == ("degraded", ["no worker serves pico; tasks for it wait"])


def test_a_worker_that_only_loads_makes_no_fleet_ready(client: FlaskClient, worker: FakeWorker) -> None:
    worker.beat(state="loading", models_loaded=[])
    assert client.get("/ready").status_code == 503


def test_a_gpu_that_two_workers_share_counts_once(
    broker: Broker, worker: FakeWorker, disk: DiskGuard, settings: Settings
) -> None:
    worker.beat()
    FakeWorker(broker, name="w2").beat()
    assert ops.look(broker, settings.catalogue(), disk, 1.0).gpu_memory_used_mb == 1000


def test_health_without_redis_is_unhealthy(away: FlaskClient) -> None:
    answer = away.get("/health")
    found = Health.model_validate_json(answer.data)
    assert (answer.status_code, found.status, bool(answer.headers["Retry-After"])) == (503, "unhealthy", True)
    assert "Redis" in found.reasons[0]


def test_ready_with_redis_and_a_worker(client: FlaskClient, worker: FakeWorker, away: FlaskClient) -> None:
    refused = client.get("/ready")
    assert (refused.status_code, refused.get_json(force=True)["code"]) == (503, "no_worker")
    worker.beat()
    assert (client.get("/ready").status_code, client.get("/ready").get_json()) == (200, {"status": "ready"})
    refused = away.get("/ready")
    assert (refused.status_code, refused.get_json(force=True)["code"]) == (503, "redis_unavailable")
    assert refused.headers["Retry-After"]


@pytest.mark.parametrize("path", ["/api/queue", "/api/workers", "/api/models", "/api/tasks", "/api/status/" + "0" * 32])
def test_without_redis_everything_is_unavailable_for_now(away: FlaskClient, path: str) -> None:
    answer = away.get(path)
    assert (answer.status_code, answer.get_json(force=True)["code"]) == (503, "redis_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
