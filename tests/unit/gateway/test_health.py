"""What probes and monitors are told. Replication is told by real Redis servers; tests/faults fills a real disk."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI

from common.broker import Broker
from common.cards import GpuReading, Health
from common.redisstate import RedisState, Replica, redis_state
from common.settings import load_settings
from common.storage.base import Disk
from gateway import health as health_module
from gateway.app import create_app
from tests.servers import RedisServer, eventually, free_port
from tests.unit.gateway.fake_worker import FakeWorker


@pytest.fixture
def away() -> FlaskClient:
    """A gateway whose Redis is not there."""
    settings = load_settings({"redis_url": f"redis://127.0.0.1:{free_port()}/0", "models": ("simulated",)})
    return create_app(settings, Broker(settings, patience_s=0.1)).test_client()


def health(client: FlaskClient) -> Health:
    return Health.model_validate_json(client.get("/health").data)


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
    found = health(client)
    assert (found.status, found.reasons, found.workers) == ("healthy", [], 3)
    assert found.gpu_memory_used_mb == 1500
    assert found.models_loaded == ["pico", "simulated"]


def test_a_lost_gpu_degrades_the_fleet_and_is_no_worker(
    client: FlaskClient, broker: Broker, worker: FakeWorker
) -> None:
    lost = FakeWorker(broker, name="host.gpu1.lost")
    lost.beat(state="lost", device="cuda:1", gpu=None, models=[], capacity=0)
    found = health(client)
    assert (found.status, found.workers) == ("degraded", 0)
    assert found.reasons == ["GPUs lost: 1; see /api/workers", "no worker is alive"]
    assert client.get("/ready").status_code == 503
    worker.beat()
    found = health(client)
    assert (found.status, found.workers, len(found.reasons)) == ("degraded", 1, 1)
    assert client.get("/ready").status_code == 200


def test_a_model_that_no_worker_serves_is_told(client: FlaskClient, worker: FakeWorker) -> None:
    worker.beat(models=["simulated"])
    found = health(client)
    assert (found.status, found.reasons) == ("degraded", ["no worker serves pico; tasks for it wait"])


def test_a_worker_that_only_loads_makes_no_fleet_ready(client: FlaskClient, worker: FakeWorker) -> None:
    worker.beat(state="loading", models_loaded=[])
    assert client.get("/ready").status_code == 503


def test_a_gpu_that_two_workers_share_counts_once(client: FlaskClient, broker: Broker, worker: FakeWorker) -> None:
    worker.beat()
    FakeWorker(broker, name="w2").beat()
    assert health(client).gpu_memory_used_mb == 1000


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


def test_live_asks_nobody(away: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> None:
        raise AssertionError("a command to Redis")

    monkeypatch.setattr(Broker, "_patiently", ask)
    answer = away.get("/live")
    assert (answer.status_code, answer.get_json()) == (200, {"status": "alive"})


def test_a_gpu_whose_driver_tells_nothing_degrades_the_fleet(
    client: FlaskClient, broker: Broker, worker: FakeWorker
) -> None:
    worker.beat()
    silent = FakeWorker(broker, name="w2")
    silent.beat(gpu=None, device="cuda:1")
    assert health(client).reasons == [], "it has only just started"
    silent.beat(gpu=None, device="cuda:1", started_at=datetime.now(UTC) - timedelta(minutes=1))
    (reason,) = health(client).reasons
    assert reason.startswith("GPUs of which their driver tells nothing: 1;") and "host" not in reason.split(";")[0]
    silent.beat(gpu=None, device="cpu", started_at=datetime.now(UTC) - timedelta(minutes=1))
    assert health(client).status == "healthy"


def test_a_workers_disk_that_is_nearly_full_degrades_the_fleet(
    client: FlaskClient, broker: Broker, worker: FakeWorker
) -> None:
    worker.beat()
    for host, free in (("near", 16), ("far", 15), ("empty", 0)):
        broker.note_disk(host, Disk(free, 0 if host == "empty" else 100))
    (reason,) = health(client).reasons
    assert reason.startswith("hosts whose disk for results is nearly full: 1;") and "far" not in reason
    broker.note_disk("far", Disk(90, 100))
    assert health(client).status == "healthy"


# Redis: its file and its replicas


class Pair:
    """A primary and its replica, and a gateway that expects one."""

    def __init__(self, folder: Path) -> None:
        for name in ("primary", "replica"):
            (folder / name).mkdir()
        self.primary = RedisServer(folder / "primary", "--repl-diskless-sync-delay", "0")
        self.replica = RedisServer(folder / "replica", "--replicaof", "127.0.0.1", str(self.primary.port))
        self.settings = load_settings(
            {"redis_url": self.primary.url, "models": ("simulated",), "data_dir": folder, "redis_replicas": 1,
             "redis_lag_s": 1.5, "redis_lag_mb": 0.5}
        )  # fmt: skip

    def reasons(self, client: FlaskClient) -> str:
        return " ".join(health(client).reasons)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(health_module, "STATE_KNOWN_S", 0.0)
    pair = Pair(tmp_path)
    with pair.primary:
        yield pair
        pair.replica.kill()


def test_replicas_that_are_away_or_lag_degrade_the_fleet(pair: Pair) -> None:
    broker = Broker(pair.settings)
    client = create_app(pair.settings, broker).test_client()
    FakeWorker(broker).beat()
    missing = "Redis replicas that follow: 0 of 1 (ZFLEET_REDIS_REPLICAS)"
    assert missing in pair.reasons(client)
    pair.replica.start()
    eventually(lambda: health(client).status == "healthy", within_s=20)
    _cut_off(pair, client)
    pair.replica.kill()
    eventually(lambda: missing in pair.reasons(client))
    broker.close()


def _cut_off(pair: Pair, client: FlaskClient) -> None:
    """Let the replica hang: it is still connected, hears nothing and says nothing."""
    pair.replica.signal(signal.SIGSTOP)
    worker = FakeWorker(Broker(pair.settings))
    for _ in range(8):
        pair.primary.client.set("other", "x" * 200_000)

    def told() -> bool:
        worker.beat()
        reasons = pair.reasons(client)
        return "silent for" in reasons and "MiB behind" in reasons

    eventually(told, within_s=20, every_s=0.2)
    assert str(pair.replica.port) not in pair.reasons(client), "anybody may ask"
    pair.replica.signal(signal.SIGCONT)
    eventually(lambda: worker.beat() and health(client).status == "healthy", within_s=20, every_s=0.1)
    worker.broker.close()


def test_what_info_tells_is_read_as_redis_writes_it() -> None:
    replica = {"ip": "10.0.0.2", "port": 6379, "state": "online", "offset": 90, "lag": 3}
    replication = {"role": "master", "slave0": replica, "slave1": replica | {"state": "wait_bgsave"},
                   "slave_read_only": 1, "master_repl_offset": 100}  # fmt: skip
    assert redis_state({}, replication) == RedisState(True, True, (Replica(True, 3, 10), Replica(False, 3, 10)))
    failed = {"aof_last_write_status": "err", "aof_last_bgrewrite_status": "err"}
    assert redis_state(failed, {}) == RedisState(False, False, ())


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (RedisState(False, True, ()), "Redis cannot write its append-only file"),
        (RedisState(True, False, ()), "Redis cannot rewrite its append-only file"),
    ],
    ids=["write", "rewrite"],
)
def test_a_file_that_redis_cannot_write_degrades_the_fleet(
    app: OpenAPI, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch, state: RedisState, reason: str
) -> None:
    worker.beat()
    client, until = app.test_client(), time.monotonic() + health_module.STATE_KNOWN_S
    assert health(client).status == "healthy"
    monkeypatch.setattr(Broker, "redis_state", lambda _: state)
    assert health(client).status == "healthy", "it is asked every three seconds at most"
    monkeypatch.setattr(health_module.time, "monotonic", lambda: until + 1)
    (told,) = health(client).reasons
    assert told.startswith(reason)


def test_how_many_replicas_there_should_be() -> None:
    sentinel = "rediss+sentinel://a:26379,b:26379/mymaster/0"
    assert [
        load_settings({"redis_url": url, "redis_replicas": count}).expected_replicas
        for url, count in (("redis://a/0", None), (sentinel, None), (sentinel, 0), (sentinel, 2), ("redis://a/0", 2))
    ] == [0, 1, 0, 2, 2]
