"""A fleet of real workers is shared among tenants, and RQ's tools show all of them."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from common import keys
from common.broker import Broker
from common.records import NewTask
from common.settings import Settings
from tests.conftest import resolved
from tests.fleet import await_final, ready_workers
from tests.servers import RedisServer, WorkerServer, eventually

SHARES = {"acme": 1, "bell": 1, "core": 2}
BACKLOGS = {"acme": 600, "bell": 150, "core": 280}


def submit_as(broker: Broker, tenant: str, count: int) -> list[str]:
    ids = [secrets.token_hex(16) for _ in range(count)]
    for task_id in ids:
        broker.submit(NewTask(task_id=task_id, tenant=tenant, request=resolved()))
    return ids


def test_a_fleet_is_shared_and_a_newcomer_is_next(
    broker: Broker, settings: Settings, redis_server: RedisServer, tmp_path: Path
) -> None:
    client = redis_server.client
    client.hset(keys.SHARES, mapping=SHARES)
    ids = [task_id for tenant, count in BACKLOGS.items() for task_id in submit_as(broker, tenant, count)]

    def begun() -> Counter[str]:
        return Counter({t: n - client.llen(f"{keys.RQ_QUEUE}simulated.normal.{t}") for t, n in BACKLOGS.items()})

    changes = {
        "models": ("simulated",),
        "workers_per_device": 2,
        "simulated_image_ms": 20.0,
        "max_batch": 1,
        "drain_s": 0.2,
    }
    with WorkerServer(settings.model_copy(update=changes), tmp_path / "log"):
        workers = {keys.RQ_WORKER + card.name for card in ready_workers(broker, 2)}
        eventually(lambda: begun().total() >= 160, within_s=30)
        served = begun()
        for tenant, share in SHARES.items():
            assert served[tenant] / served.total() == pytest.approx(share / 4, rel=0.05), served
        (newcomer,) = await_final(broker, submit_as(broker, "dune", 1))
        assert newcomer.started_at is not None
        others = [task for task_id in ids if (task := broker.view(task_id)) and task.started_at]
        ahead = Counter(
            t.tenant for t in others if t.started_at and newcomer.created_at < t.started_at < newcomer.started_at
        )
        assert max(ahead.values(), default=0) <= 1, (
            "each tenant began one at most: that whose turn was at the same moment"
        )
        command = [sys.executable, "-m", "rq.cli", "info", "--raw", "--only-queues", "--serializer", "json"]
        shown = subprocess.run(
            [*command, "--url", settings.redis_url], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        for tenant in (*SHARES, "dune"):
            queue = f"simulated.normal.{tenant}"
            assert f"queue {queue} " in shown
            assert client.smembers(keys.RQ_WORKERS_OF + queue) & workers, "RQ sees who works there"
