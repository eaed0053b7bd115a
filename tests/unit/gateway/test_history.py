from __future__ import annotations

import time

import pytest
from flask.testing import FlaskClient

from common.broker import Broker
from tests.servers import RedisServer
from tests.tenants import bearer, new_key
from tests.unit.gateway.fake_worker import FakeWorker


def test_a_chart_has_a_point_for_each_step(client: FlaskClient, worker: FakeWorker, redis_server: RedisServer) -> None:
    worker.beat()
    worker.broker.sample()
    client.post("/api/submit", json={"prompt": "x", "n": 2})
    client.post("/api/submit", json={"prompt": "x"})
    worker.work()
    redis_server.client.set("zf:sampled", int(time.time() / 10) - 1)
    worker.broker.sample()
    answer = client.get("/api/history").get_json()
    assert (answer["window"], answer["step_seconds"]) == ("15m", 10)
    (point,) = answer["points"]
    assert point.pop("at").endswith("Z") and point.pop("oldest_age_seconds") >= 0
    assert 0 < point.pop("p50_seconds") <= point.pop("p95_seconds") < 30
    (line,) = point.pop("queues")
    assert line.pop("oldest_age_seconds") >= 0
    assert line == {"model": "simulated", "priority": "normal", "queued": 1}
    assert point == {
        "submitted": 2, "succeeded": 1, "failed": 0, "canceled": 0, "expired": 0, "images": 2, "error_ratio": 0.0,
        "queued": 1, "running": 0, "workers": 1, "gpu_utilisation_percent": None, "gpu_memory_used_mb": 1000,
        "joules_per_image": None, "crashes": 0, "fuses": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("window", "step"), [("15m", 10), ("6h", 240), ("7d", 7200)])
def test_there_are_three_windows(client: FlaskClient, window: str, step: int) -> None:
    answer = client.get(f"/api/history?window={window}")
    assert answer.get_json() == {"window": window, "step_seconds": step, "points": []}
    assert answer.headers["Cache-Control"] == "no-store"


def test_another_window_is_refused_by_name(client: FlaskClient) -> None:
    answer = client.get("/api/history?window=1y")
    assert answer.status_code == 422
    assert answer.get_json()["errors"][0]["loc"] == "window"


def test_it_is_for_admins(client: FlaskClient, broker: Broker) -> None:
    assert client.get("/api/history", headers=bearer(new_key(broker))).status_code == 403
    assert client.get("/api/history", headers=bearer(new_key(broker, admin=True))).status_code == 200
