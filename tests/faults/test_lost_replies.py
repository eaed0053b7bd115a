"""Replies that get lost on the way: what was asked has happened, is asked again, and must not happen twice."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from common.broker import Broker
from common.link import SCRIPTS
from common.schemas import TaskStatus
from common.settings import Settings
from tests.faults.conftest import NoteFn
from tests.faults.proxy import Proxy
from tests.faults.rig import LONG
from tests.faults.table import Count
from tests.fleet import await_final, ready_workers, submit_many
from tests.servers import GatewayServer, RedisServer, WorkerServer, eventually

LOST = 12  # at once; more would take longer than a gateway's patience, and 503 is no lost reply
CLIENTS = 4
TASKS = 48
BURSTS = 3 if LONG else 1  # of so many tasks and losses


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def over_proxy(settings: Settings, proxy: Proxy) -> Settings:
    """Settings of a process whose way to Redis is the proxy, while the test's own is direct."""
    return settings.model_copy(
        update={
            "redis_url": proxy.url,
            "models": ("simulated",),
            "workers_per_device": 2,
            "simulated_image_ms": 20.0,
            "queue_cap": BURSTS * TASKS,
        }
    )


def test_a_submit_whose_reply_is_lost_is_one_task(
    broker: Broker, over_proxy: Settings, proxy: Proxy, redis_server: RedisServer, note: NoteFn, tmp_path: Path
) -> None:
    answers: list[requests.Response] = []

    def client(number: str) -> None:
        with requests.Session() as session:
            for k in range(TASKS // CLIENTS):
                keys = {"Idempotency-Key": f"{number}.{k}"} if number[-1] in "13" else {}
                answers.append(
                    session.post(f"{gateway.url}/api/submit", json={"prompt": "x"}, headers=keys, timeout=10)
                )

    with GatewayServer(over_proxy, tmp_path / "gateway") as gateway:
        eventually(lambda: up(gateway.url), within_s=30)
        redis_server.client.script_load(SCRIPTS["submit"][0])
        for burst in range(BURSTS):
            proxy.lose(SCRIPTS["submit"][1], LOST)
            clients = [threading.Thread(target=client, args=(f"{burst}.{number}",)) for number in range(CLIENTS)]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()
    assert (proxy.lost, proxy.to_lose) == (BURSTS * LOST, 0)
    assert Counter(answer.status_code for answer in answers) == {202: BURSTS * TASKS}
    accepted = [answer.json()["task_id"] for answer in answers]
    queued = redis_server.client.lrange("rq:queue:simulated.normal.default", 0, -1)
    assert sorted(queued) == sorted(accepted), "an answer without its task, or a task twice"
    assert len(set(accepted)) == broker.pending() == BURSTS * TASKS
    with WorkerServer(over_proxy, tmp_path / "log"):
        count = Count.of(broker, over_proxy, accepted)
    note("the reply to a submit lost", proxy.lost, count)
    assert not count.problems, count


@pytest.mark.parametrize("transition", ["claim", "finish", "progress", "beat"])
def test_a_worker_whose_replies_are_lost_doubles_nothing(
    transition: str,
    broker: Broker,
    over_proxy: Settings,
    proxy: Proxy,
    redis_server: RedisServer,
    note: NoteFn,
    tmp_path: Path,
) -> None:
    settings = over_proxy.model_copy(update={"beat_s": 0.2})
    with WorkerServer(settings, tmp_path / "log"):
        ready_workers(broker, 2)
        redis_server.client.script_load(SCRIPTS[transition][0])
        task_ids: list[str] = []
        for _ in range(BURSTS):
            proxy.lose(SCRIPTS[transition][1], LOST)
            task_ids += submit_many(broker, TASKS)
            await_final(broker, task_ids)
            until = time.monotonic() + 30
            while proxy.to_lose and time.monotonic() < until:  # progress is told by time, and not for each task
                task_ids += submit_many(broker, CLIENTS)
                await_final(broker, task_ids[-CLIENTS:])
        count = Count.of(broker, settings, task_ids)
        for task in await_final(broker, task_ids):
            assert (task.status, [a.outcome for a in task.attempts]) == (TaskStatus.SUCCEEDED, ["succeeded"])
    note(f"the reply to a {transition} lost", proxy.lost, count)
    assert (proxy.lost, proxy.to_lose) == (BURSTS * LOST, 0)
    assert not count.problems, count
    assert sum(path.is_file() for path in settings.results_dir.rglob("*")) == len(task_ids)
    assert broker.pending() == 0
    assert sum(queue.queued + queue.running for queue in broker.queues()) == 0


def test_a_cancel_whose_reply_is_lost_tells_that_it_was_this_one(
    broker: Broker, over_proxy: Settings, proxy: Proxy, redis_server: RedisServer
) -> None:
    far = Broker(over_proxy)
    (task_id,) = submit_many(broker, 1)
    redis_server.client.script_load(SCRIPTS["cancel"][0])
    proxy.lose(SCRIPTS["cancel"][1], 1)
    assert far.cancel(task_id, "default") == "canceled"
    assert proxy.lost == 1
    far.close()


def test_a_way_that_is_cut_for_a_while_loses_nothing(
    broker: Broker, over_proxy: Settings, proxy: Proxy, tmp_path: Path
) -> None:
    settings = over_proxy.model_copy(update={"simulated_image_ms": 100.0})
    with WorkerServer(settings, tmp_path / "log"):
        ready_workers(broker, 2)
        task_ids = submit_many(broker, 16)
        for _ in range(3):
            proxy.cut()
            time.sleep(0.3)
            proxy.mend()
            time.sleep(0.2)
        proxy.delay_s = 0.05
        for task in await_final(broker, task_ids):
            assert (task.status, [a.outcome for a in task.attempts]) == (TaskStatus.SUCCEEDED, ["succeeded"])
    assert sum(path.is_file() for path in settings.results_dir.rglob("*")) == len(task_ids)


def up(url: str) -> bool:
    try:
        return requests.get(url + "/health", timeout=1).ok
    except requests.RequestException:
        return False
