from __future__ import annotations

import re
import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import create_environ

from common.apikeys import ApiKey, Token
from common.broker import Broker
from common.cards import GpuReading
from common.records import Hold, NewTask
from common.schemas import TaskError
from common.settings import Settings, load_settings
from gateway.app import TRAFFIC, create_app
from tests.conftest import resolved
from tests.servers import RedisServer, free_port
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


READING = GpuReading(
    name="H100", index=1, memory_used_mb=1024, memory_total_mb=81_920, utilisation_percent=75, temperature_c=61,
    power_w=512.5, energy_j=9000.25,
)  # fmt: skip


def test_workers_and_gpus_tell_by_slot(client: FlaskClient, worker: FakeWorker, broker: Broker) -> None:
    counters = {"models_loaded_total": 3, "models_unloaded_total": 2, "embeds_hits": 7, "embeds_misses": 5}
    began = datetime(2026, 1, 1, tzinfo=UTC)
    worker.name = "h.gpu1.aaaaaa"
    worker.beat(gpu=READING, counters={}, started_at=began, host="h")
    worker.name = "h.gpu1.000000"
    worker.beat(gpu=READING, counters=counters, started_at=began + timedelta(hours=1), host="h", rss_mb=2, state="busy")
    worker.name = "h.gpu2.lost"
    worker.beat(gpu=None, state="lost", host="h")
    found = scraped(client)
    for name, figure in (
        ("model_loads_total", 3), ("model_unloads_total", 2), ("embeds_cache_hits_total", 7),
        ("embeds_cache_misses_total", 5), ("worker_resident_memory_bytes", 2 * 1024**2),
    ):  # fmt: skip
        assert of(found, f"zfleet_{name}") == {(f"zfleet_{name}", "h.gpu1"): figure}, "of the newest in its slot"
    for name, figure in (
        ("utilisation_ratio", 0.75), ("memory_used_bytes", 1024**3), ("memory_total_bytes", 80 * 1024**3),
        ("temperature_celsius", 61), ("power_watts", 512.5), ("energy_joules_total", 9000.25),
    ):  # fmt: skip
        assert of(found, f"zfleet_gpu_{name}") == {(f"zfleet_gpu_{name}", "1", "h"): figure}
    states = {labels[1]: tasks for labels, tasks in of(found, "zfleet_workers").items()}
    assert states == {"loading": 0, "idle": 1, "busy": 1, "draining": 0, "lost": 1}


def test_a_figure_that_the_driver_does_not_give_is_left_out(client: FlaskClient, worker: FakeWorker) -> None:
    worker.beat(gpu=GpuReading(name="T4", index=0, memory_used_mb=1))
    found = scraped(client)
    assert of(found, "zfleet_gpu_memory_used_bytes") and not of(found, "zfleet_gpu_energy_joules_total")


def test_energy_is_told_of_the_fleet_and_for_an_image(
    client: FlaskClient, worker: FakeWorker, broker: Broker, redis_server: RedisServer, settings: Settings
) -> None:
    names = "zfleet_energy_joules_total", "zfleet_image_energy_joules"
    assert not of(scraped(client), *names), "nobody told"
    for joules in (9000.25, 9600.5):
        worker.beat(gpu=READING.model_copy(update={"energy_j": joules}))
        redis_server.client.set("zf:sampled", int(time.time() / 10) - 1)
        broker.sample()
        client.post("/api/submit", json={"prompt": "x", "n": 2})
        worker.work()
    assert of(scraped(client), *names) == {(names[0],): 600}, "the pictures came after the sample"
    redis_server.client.set("zf:sampled", int(time.time() / 10) - 1)
    broker.sample()
    found = scraped(create_app(settings).test_client())  # the first keeps for seconds how it was of late
    assert of(found, *names) == {(names[0],): 600, (names[1],): 150}


def test_what_workers_and_transitions_counted_is_told(client: FlaskClient, worker: FakeWorker, broker: Broker) -> None:
    worker.beat()
    for _ in range(2):
        client.post("/api/submit", json={"prompt": "x"})
    worker.work()
    (late,) = worker.take()
    error = TaskError(code="deadline_exceeded", message="late")
    broker.finish(worker.name, Hold(late.task_id, late.fence), "failed", error=error, fuse="run_limit")
    broker.reap("w9", crashed=True)
    steps = {(4, 10): "4", (5, 3): "6", (40, 1): "+Inf"}  # pictures together, how often
    for nth, ((size, times), bound) in enumerate(steps.items()):
        more = {f"batch|simulated|{bound}": times, "batch|simulated|sum": size * times}
        broker.add_counts("a worker", nth, more)
    found = scraped(client)
    assert found["zfleet_tasks_submitted_total", "simulated"] == 2
    assert (
        found["zfleet_tasks_total", "simulated", "succeeded"] == found["zfleet_tasks_total", "simulated", "failed"] == 1
    )
    assert found["zfleet_images_total", "simulated"] == found["zfleet_worker_crashes_total",] == 1
    assert (found["zfleet_fuses_tripped_total", "run_limit"], found["zfleet_fuses_tripped_total", "deadline"]) == (1, 0)
    assert found["zfleet_steps_total", "simulated"] == 95 == found["zfleet_batch_size_sum", "simulated"]
    sizes = [found["zfleet_batch_size_bucket", bound, "simulated"] for bound in ("3", "4", "6", "32", "+Inf")]
    assert sizes == [0, 10, 13, 13, 14]
    for name, count in (("task_queue_seconds", 2), ("task_duration_seconds", 1), ("submit_duration_seconds", 2)):
        labels = () if name.startswith("submit") else ("simulated",)
        assert found[f"zfleet_{name}_count", *labels] == count
        assert 0 < found[f"zfleet_{name}_sum", *labels] < 10 * count, "seconds"


def test_pausing_is_told(client: FlaskClient, broker: Broker) -> None:
    assert scraped(client)["zfleet_suspended",] == 0
    broker.suspend()
    assert scraped(client)["zfleet_suspended",] == 1


def test_ten_thousand_paths_methods_and_tenants_make_no_more_series(
    app: OpenAPI, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = app.test_client()
    client.post("/api/submit", json={"prompt": "x"})
    client.get("/nowhere")
    client.open("/nowhere", method="BREW")
    for path in ("/api/status/x", "/view/x/0.png"):
        client.get(path)
    before = scraped(client) and scraped(client)
    traffic = app.extensions[TRAFFIC]
    environ = create_environ()
    for nth in range(10_000):
        odd = secrets.token_hex(4)
        path = (f"/{odd}", f"/api/status/{odd}", f"/view/{odd}/0.png", f"/web/{odd}", f"/api/status/{odd}/x")[nth % 5]
        if nth < 500:  # through all of Flask; the others where what it found is counted
            client.open(path, method=("GET", odd.upper())[nth % 2])
        else:
            environ["PATH_INFO"] = path
            rule = app.url_map.bind_to_environ(environ)
            route = rule.match(return_rule=True)[0].rule if rule.test(method="GET") else None
            traffic.answered(route, ("GET", odd.upper())[nth % 2], 404, 0.001)
    for nth in range(0, 10_000, 100):  # a tenant is in no counter: many of them in a few queues
        broker.submit(NewTask(task_id=secrets.token_hex(16), tenant=f"t{nth}", request=resolved()))
    after = scraped(client)
    new = {labels for labels in after.keys() - before.keys() if labels[0] == "zfleet_http_requests_total"}
    assert len(new) <= 20 and after.keys() - before.keys() == new, "rules and made-up methods, at most once each"
    assert not any(re.search(r"t\d+00|[0-9a-f]{8}", label) for labels in after for label in labels)
    counted = sum(of(after, "zfleet_http_requests_total").values()) - sum(
        of(before, "zfleet_http_requests_total").values()
    )
    assert counted == 10_000 + 1, "all are counted, and the scrape before"


def test_a_path_has_the_label_of_its_rule(client: FlaskClient) -> None:
    submitted = client.post("/api/submit", json={"prompt": "x"}).get_json()
    client.get(submitted["status_url"])
    client.get("/api/status/unknown")
    client.post("/health")
    found = of(scraped(client), "zfleet_http_requests_total")
    name = "zfleet_http_requests_total"
    assert found == {
        (name, "POST", "/api/submit", "202"): 1,
        (name, "GET", "/api/status/<task_id>", "200"): 1,
        (name, "GET", "/api/status/<task_id>", "404"): 1,
        (name, "POST", "unmatched", "405"): 1,
    }
