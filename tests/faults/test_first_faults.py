"""The first faults: every accepted task ends, and ends once, whatever is killed under it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import requests

from common.broker import Broker
from common.schemas import TaskStatus
from common.settings import Settings
from common.storage import open_storage
from tests.fleet import await_final, await_running, ready_workers, record, submit_many
from tests.servers import GatewayServer, RedisServer, WorkerServer, eventually


@pytest.fixture
def fleet_settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={"models": ("simulated",), "workers_per_device": 2, "simulated_image_ms": 400.0, "drain_s": 5.0}
    )


def children(server: WorkerServer) -> list[psutil.Process]:
    return psutil.Process(server.pid).children()


def assert_each_ended_once(broker: Broker, settings: Settings, task_ids: list[str]) -> None:
    for task in await_final(broker, task_ids):
        assert task.status is TaskStatus.SUCCEEDED, task
        assert Counter(attempt.outcome for attempt in task.attempts)["succeeded"] == 1
        assert len(open_storage(settings).read(task.images[0].key)) == task.images[0].bytes
    kept = [path for path in settings.results_dir.rglob("*") if path.is_file()]
    assert len(kept) == len(task_ids), "a second result, or half of one, is lying about"
    assert broker.pending() == 0
    assert sum(queue.queued + queue.running for queue in broker.queues()) == 0


def test_kill_9_of_a_child_mid_run(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    with WorkerServer(fleet_settings, tmp_path / "log") as server:
        cards = {card.name: card for card in ready_workers(broker, 2)}
        task_ids = submit_many(broker, 1)
        running = await_running(broker, task_ids)
        os.kill(cards[running.attempts[0].worker].pid, signal.SIGKILL)
        killed = time.monotonic()
        eventually(lambda: len(record(broker, running.task_id).attempts) == 2, within_s=2)
        assert time.monotonic() - killed < 2
        assert_each_ended_once(broker, fleet_settings, task_ids)
        outcomes = [attempt.outcome for attempt in record(broker, running.task_id).attempts]
        assert outcomes == ["crashed", "succeeded"]
        ready_workers(broker, 2, within_s=20)  # and the dead one has a successor
        assert len(children(server)) == 2


def test_a_child_that_dies_idle_is_replaced(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    with WorkerServer(fleet_settings, tmp_path / "log"):
        before = ready_workers(broker, 2)
        os.kill(before[0].pid, signal.SIGKILL)
        eventually(lambda: before[0].name not in [card.name for card in broker.workers()], within_s=2)
        ready_workers(broker, 2)


def test_sigterm_under_load_loses_nothing(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    with WorkerServer(fleet_settings, tmp_path / "log") as server:
        ready_workers(broker, 2)
        task_ids = submit_many(broker, 8)
        await_running(broker, task_ids)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 5
    statuses = Counter(record(broker, task_id).status for task_id in task_ids)
    assert set(statuses) == {TaskStatus.SUCCEEDED, TaskStatus.QUEUED}
    assert not broker.workers()
    with WorkerServer(fleet_settings, tmp_path / "log"):
        assert_each_ended_once(broker, fleet_settings, task_ids)


def test_sigterm_gives_back_what_cannot_end_in_time(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    slow = fleet_settings.model_copy(update={"simulated_image_ms": 30_000.0, "drain_s": 0.5})
    with WorkerServer(slow, tmp_path / "log") as server:
        ready_workers(broker, 2)
        task_ids = submit_many(broker, 2, steps=50)
        eventually(lambda: all(record(broker, i).status is TaskStatus.RUNNING for i in task_ids))
        assert server.stop() == 0
    for task in (record(broker, task_id) for task_id in task_ids):
        assert (task.status, [a.outcome for a in task.attempts]) == (TaskStatus.QUEUED, ["released"])
    with WorkerServer(fleet_settings, tmp_path / "log"):
        assert_each_ended_once(broker, fleet_settings, task_ids)


def test_redis_killed_with_tasks_queued_and_running(fleet_settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as redis_server:
        settings = fleet_settings.model_copy(update={"redis_url": redis_server.url})
        broker = Broker(settings, patience_s=20.0)
        with WorkerServer(settings, tmp_path / "log") as server:
            ready_workers(broker, 2)
            task_ids = submit_many(broker, 10)
            await_running(broker, task_ids)
            pids = {child.pid for child in children(server)}
            redis_server.kill()
            time.sleep(1.5)
            redis_server.start()
            assert_each_ended_once(broker, settings, task_ids)
            assert {child.pid for child in children(server)} == pids, "a worker left because Redis was away"


def test_an_outage_longer_than_the_lease_doubles_nothing(fleet_settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    changes = {"lease_s": 1.5, "beat_s": 0.3, "simulated_image_ms": 6_000.0}
    with RedisServer(folder) as redis_server:
        settings = fleet_settings.model_copy(update={"redis_url": redis_server.url, **changes})
        broker = Broker(settings, patience_s=20.0)
        with WorkerServer(settings, tmp_path / "log"):
            ready_workers(broker, 2)
            task_ids = submit_many(broker, 2, steps=60)
            eventually(lambda: all(record(broker, i).status is TaskStatus.RUNNING for i in task_ids))
            redis_server.kill()
            time.sleep(3.0)
            redis_server.start()
            for task in await_final(broker, task_ids):
                assert [attempt.outcome for attempt in task.attempts] == ["released", "succeeded"]


def test_a_frozen_worker_that_thaws_is_refused(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    settings = fleet_settings.model_copy(update={"lease_s": 1.5, "beat_s": 0.3, "simulated_image_ms": 1_500.0})
    with WorkerServer(settings, tmp_path / "log"):
        cards = {card.name: card for card in ready_workers(broker, 2)}
        (task_id,) = submit_many(broker, 1)
        frozen = cards[await_running(broker, [task_id]).attempts[0].worker]
        os.kill(frozen.pid, signal.SIGSTOP)
        try:
            await_final(broker, [task_id], within_s=15)
        finally:
            os.kill(frozen.pid, signal.SIGCONT)
        eventually(lambda: [c.state for c in broker.workers() if c.name == frozen.name] == ["idle"])
        assert_each_ended_once(broker, settings, [task_id])
        assert [a.outcome for a in record(broker, task_id).attempts] == ["lost", "succeeded"]


def test_a_drain_while_redis_is_away_ends(fleet_settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as redis_server:
        settings = fleet_settings.model_copy(update={"redis_url": redis_server.url, "drain_s": 0.5})
        server = WorkerServer(settings, tmp_path / "log").start()
        broker = Broker(settings)
        ready_workers(broker, 2)
        await_running(broker, submit_many(broker, 2))
        orphans = children(server)
        redis_server.kill()
        server.kill()
        _, alive = psutil.wait_procs(orphans, timeout=20)
        assert not alive, "a worker without a supervisor and without Redis holds its GPU for ever"


def test_a_killed_supervisor_leaves_no_children(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    server = WorkerServer(fleet_settings, tmp_path / "log").start()
    ready_workers(broker, 2)
    orphans = children(server)
    task_ids = submit_many(broker, 2)
    await_running(broker, task_ids)
    server.kill()
    _, alive = psutil.wait_procs(orphans, timeout=10)
    assert not alive
    assert {record(broker, task_id).status for task_id in task_ids} == {TaskStatus.SUCCEEDED}


def test_a_running_task_is_canceled_at_the_next_step(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    slow = fleet_settings.model_copy(update={"simulated_image_ms": 20_000.0})
    with WorkerServer(slow, tmp_path / "log"):
        ready_workers(broker, 2)
        (task_id,) = submit_many(broker, 1, steps=100)
        await_running(broker, [task_id])
        assert broker.cancel(task_id, "default") == "flagged"
        (task,) = await_final(broker, [task_id], within_s=2)
        assert (task.status, task.attempts[0].outcome) == (TaskStatus.CANCELED, "canceled")


def test_a_model_that_cannot_be_loaded_takes_no_task(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    models = tmp_path / "models.toml"
    models.write_text(f'[broken]\nsource = "{tmp_path}/nowhere"\n')
    settings = fleet_settings.model_copy(update={"models_file": models, "models": ("broken",)})
    log = tmp_path / "log"
    with WorkerServer(settings, log):
        (task_id,) = submit_many(broker, 1, model="broken")
        eventually(lambda: log.exists() and "model_load_failed" in log.read_text(), within_s=60)
        assert record(broker, task_id).status is TaskStatus.QUEUED
        assert str(tmp_path / "nowhere") in log.read_text()


def test_a_killed_gateway_loses_no_accepted_task(broker: Broker, fleet_settings: Settings, tmp_path: Path) -> None:
    accepted: list[str] = []
    sent: list[str] = []
    stop = threading.Event()

    def client(url: str) -> None:
        with requests.Session() as session:
            while not stop.is_set():
                key = secrets.token_hex(8)
                sent.append(key)
                with contextlib.suppress(requests.RequestException):
                    answer = session.post(
                        f"{url}/api/submit", json={"prompt": "x"}, headers={"Idempotency-Key": key}, timeout=5
                    )
                    if answer.status_code == 202:
                        accepted.append(answer.json()["task_id"])

    quick = fleet_settings.model_copy(update={"simulated_image_ms": 5.0})
    with GatewayServer(quick, tmp_path / "gateway") as gateway, WorkerServer(quick, tmp_path / "log"):
        eventually(lambda: answers(gateway.url + "/health"), within_s=30)
        clients = [threading.Thread(target=client, args=(gateway.url,)) for _ in range(4)]
        for thread in clients:
            thread.start()
        for _ in range(3):
            time.sleep(0.7)
            for process in [*psutil.Process(gateway.pid).children(), psutil.Process(gateway.pid)]:
                process.kill()
            gateway.kill()
            gateway.start()
            eventually(lambda: answers(gateway.url + "/health"), within_s=30)
        time.sleep(0.5)
        stop.set()
        for thread in clients:
            thread.join()
        assert len(accepted) > 20
        assert len(set(accepted)) == len(accepted)
        done = await_final(broker, accepted, within_s=60)
        assert {task.status for task in done} == {TaskStatus.SUCCEEDED}
        eventually(lambda: broker.pending() == 0, within_s=60)
        listed, _ = broker.tasks("default", status=None, limit=100_000, before=None)
        assert set(accepted) <= {task.task_id for task in listed}
        assert len(listed) <= len(sent), "one submit became two tasks"


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=1).ok
    except requests.RequestException:
        return False
