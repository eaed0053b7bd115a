from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from flask.testing import FlaskClient
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families

from common.apikeys import ApiKey, Token
from common.broker import Broker
from common.settings import Settings, load_settings
from gateway.app import create_app
from tests.servers import free_port
from tests.unit.gateway.fake_worker import FakeWorker


def shown(broker: Broker, **changes: object) -> dict[str, str]:
    """Make a key, and return the header that shows it."""
    token = Token.new()
    fields: dict[str, object] = {"tenant": "acme", "digest": token.digest, "created_at": datetime.now(UTC)}
    broker.put_key(ApiKey.model_validate({"key_id": token.key_id, **fields, **changes}))
    return {"Authorization": f"Bearer {token}"}


def scraped(client: FlaskClient, headers: dict[str, str] | None = None) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, in the order of their names."""
    answer = client.get("/metrics", headers=headers)
    assert (answer.status_code, answer.content_type) == (200, CONTENT_TYPE_LATEST)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def of(found: dict[tuple[str, ...], float], *names: str) -> dict[tuple[str, ...], float]:
    return {labels: figure for labels, figure in found.items() if labels[0] in names}


def test_without_tasks_all_that_can_be_counted_is_there_as_nothing(client: FlaskClient) -> None:
    found = scraped(client)
    assert found["zfleet_tasks_submitted_total", "simulated"] == found["zfleet_images_total", "pico"] == 0
    outcomes = ("succeeded", "failed", "canceled", "expired")
    assert all(found["zfleet_tasks_total", "simulated", outcome] == 0 for outcome in outcomes)
    assert found["zfleet_queue_tasks", "pico", "low"] == found["zfleet_queue_oldest_age_seconds", "pico", "low"] == 0
    assert not of(found, "zfleet_gpu_power_watts", "zfleet_worker_resident_memory_bytes"), "nobody told"


def test_tasks_that_wait_are_counted_by_model_and_priority(client: FlaskClient, broker: Broker) -> None:
    mine, other = shown(broker), shown(broker, tenant="other")
    for headers, priority in ((mine, "high"), (mine, "normal"), (other, "normal")):
        answer = client.post("/api/submit", json={"prompt": "x", "priority": priority}, headers=headers)
        assert answer.status_code == 202
    found = scraped(client, shown(broker, admin=True))
    assert {labels: tasks for labels, tasks in of(found, "zfleet_queue_tasks").items() if tasks} == {
        ("zfleet_queue_tasks", "simulated", "high"): 1.0,
        ("zfleet_queue_tasks", "simulated", "normal"): 2.0,
    }, "and no tenant is named"
    assert found["zfleet_tasks_submitted_total", "simulated"] == 3
    assert 0 < found["zfleet_queue_oldest_age_seconds", "simulated", "high"] < 60


def test_the_error_of_estimates_is_a_histogram(client: FlaskClient, worker: FakeWorker, settings: Settings) -> None:
    worker.beat()
    for _ in range(3):  # of which the first had no estimate
        client.post("/api/submit", json={"prompt": "x"})
        worker.work()
    found = scraped(client)
    name = "zfleet_eta_error_ratio"
    buckets = [found[f"{name}_bucket", bound, "simulated"] for bound in ("0.05", "0.5", "1", "2", "+Inf")]
    assert buckets == sorted(buckets) and buckets[-1] == found[f"{name}_count", "simulated"] == 2
    assert found[f"{name}_sum", "simulated"] > 0
    again = scraped(create_app(settings).test_client())
    parts = [f"{name}_{part}" for part in ("bucket", "count", "sum")]
    assert of(again, *parts) == of(found, *parts), "another process tells the same"


def test_it_is_for_admins(client: FlaskClient, broker: Broker) -> None:
    plain = shown(broker)
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers=plain).status_code == 403
    described: Any = client.get("/openapi.json").get_json()["paths"]["/metrics"]["get"]["responses"]
    assert set(described) >= {"200", "401", "403", "503"}


def test_without_redis_it_is_no_empty_answer() -> None:
    settings = load_settings({"redis_url": f"redis://127.0.0.1:{free_port()}/0", "models": ("simulated",)})
    away = create_app(settings, Broker(settings, patience_s=0.1)).test_client()
    answer = away.get("/metrics")
    assert (answer.status_code, answer.get_json()["code"]) == (503, "redis_unavailable")
