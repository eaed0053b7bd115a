"""RQ's own tools show this fleet: depths, what runs where, and pausing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from common.broker import Broker
from common.schemas import TaskStatus
from common.settings import Settings
from tests.fleet import await_final, await_running, ready_workers, record, submit_many
from tests.servers import Server, WorkerServer, eventually, free_port

QUEUE = "simulated.normal.default"


@pytest.fixture
def fleet_settings(settings: Settings) -> Settings:
    changes = {
        "models": ("simulated",),
        "workers_per_device": 2,
        "simulated_image_ms": 30_000.0,
        "beat_s": 0.5,
        "drain_s": 0.2,
    }
    return settings.model_copy(update=changes)


def rq(*args: str, url: str) -> str:
    """Run RQ's command line and return what it prints."""
    command = [sys.executable, "-m", "rq.cli", *args, "--url", url]
    if args[0] == "info":
        command += ["--serializer", "json"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def depth(url: str) -> list[str]:
    return [line for line in rq("info", "--raw", "--only-queues", url=url).splitlines() if line.startswith("queue")]


def test_rq_info_shows_depths_and_workers_while_tasks_run(
    broker: Broker, fleet_settings: Settings, tmp_path: Path
) -> None:
    url = fleet_settings.redis_url
    with WorkerServer(fleet_settings, tmp_path / "log"):
        names = {card.name for card in ready_workers(broker, 2)}
        task_ids = submit_many(broker, 7, steps=100)
        eventually(lambda: [record(broker, i).status for i in task_ids].count(TaskStatus.RUNNING) == 2)
        assert depth(url) == [f"queue {QUEUE} 5, 2 executing, 0 finished, 0 failed"]
        workers = [line for line in rq("info", "--raw", "--only-workers", url=url).splitlines() if "worker" in line]
        assert {line.split()[1] for line in workers} == names
        assert all(" busy " in line and QUEUE in line for line in workers)
        assert broker.cancel(task_ids[-1], "default") == "canceled"
        assert depth(url) == [f"queue {QUEUE} 4, 2 executing, 0 finished, 0 failed"]
    assert not [line for line in rq("info", "--raw", "--only-workers", url=url).splitlines() if "worker" in line]
    assert depth(url)[0].startswith(f"queue {QUEUE} ")


def test_rqs_own_clean_up_takes_nothing_from_a_run(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    from redis import Redis
    from rq import Queue
    from rq.registry import clean_registries
    from rq.serializers import JSONSerializer

    with WorkerServer(fleet_settings.model_copy(update={"simulated_image_ms": 3_000.0}), tmp_path / "log"):
        ready_workers(broker, 2)
        task_ids = submit_many(broker, 2)
        await_running(broker, task_ids)
        connection = Redis.from_url(fleet_settings.redis_url)
        for _ in range(20):
            clean_registries(Queue(QUEUE, connection=connection, serializer=JSONSerializer))
        assert {task.status for task in await_final(broker, task_ids)} == {TaskStatus.SUCCEEDED}


def test_rq_suspend_and_resume_steer_the_fleet(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    quick = fleet_settings.model_copy(update={"simulated_image_ms": 40.0})
    with WorkerServer(quick, tmp_path / "log"):
        ready_workers(broker, 2)
        rq("suspend", url=quick.redis_url)
        task_ids = submit_many(broker, 3)
        time.sleep(1.5)
        assert {record(broker, i).status for i in task_ids} == {TaskStatus.QUEUED}
        rq("resume", url=quick.redis_url)
        await_final(broker, task_ids, within_s=20)


def test_rq_empty_loses_no_accepted_task(
    broker: Broker, fleet_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_ids = submit_many(broker, 3)
    rq("empty", QUEUE, url=fleet_settings.redis_url)
    assert broker.queues()[0].queued == 0
    monkeypatch.setattr("common.broker.RECONCILE_GRACE_S", 0.0)
    broker.reconcile()
    quick = fleet_settings.model_copy(update={"simulated_image_ms": 40.0})
    with WorkerServer(quick, tmp_path / "log"):
        assert {task.status for task in await_final(broker, task_ids)} == {TaskStatus.SUCCEEDED}


def test_rq_dashboard_shows_the_same(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    port = free_port()
    command = [
        sys.executable, "-m", "rq_dashboard", "--port", str(port), "--redis-url", fleet_settings.redis_url, "--json",
    ]  # fmt: skip

    def ask(what: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/0/data/{what}.json", timeout=10) as answer:
            return json.load(answer)

    def answers() -> bool:
        try:
            return bool(ask("queues"))
        except OSError:
            return False

    with WorkerServer(fleet_settings, tmp_path / "log"), Server(command, log=tmp_path / "dashboard") as dashboard:
        names = {card.name for card in ready_workers(broker, 2)}
        eventually(answers, within_s=30)
        task_ids = submit_many(broker, 5, steps=100)
        eventually(lambda: [record(broker, i).status for i in task_ids].count(TaskStatus.RUNNING) == 2)
        (queue,) = [queue for queue in ask("queues")["queues"] if queue["name"] == QUEUE]
        assert (queue["count"], queue["started_job_registry_count"]) == (3, 2)
        workers = ask("workers")["workers"]
        assert {worker["name"] for worker in workers} == names
        assert {worker["state"] for worker in workers} == {"busy"}
        job = ask(f"job/{task_ids[-1]}")
        assert job["status"] == "queued"
        assert "red circle" not in json.dumps(job)
        dashboard.kill()
