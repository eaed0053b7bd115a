"""The primary dies under load and a replica takes over: every task that was accepted ends, and ends once."""

from __future__ import annotations

import random
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Self

import pytest
import requests

from common.broker import Broker
from common.schemas import TaskStatus
from common.settings import Settings
from common.storage import open_storage
from tests.faults.sentinel import SERVICE, Watched
from tests.fleet import await_final, ready_workers
from tests.servers import GatewayServer, WorkerServer, eventually

CLIENTS = 3
PAUSE_S = 0.02  # between two submits of a client
RECOVERY_S = 15.0


class Clients:
    """Some who submit until stopped, each task under a key that they repeat until it is accepted, and look after it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(CLIENTS)]
        self.accepted: dict[str, set[str]] = {}  # by key
        self.accepted_at: list[float] = []  # on time.monotonic's clock
        self.statuses: Counter[int] = Counter()  # of looks at accepted tasks

    @property
    def task_ids(self) -> list[str]:
        return [task_id for ids in list(self.accepted.values()) for task_id in ids]

    def recovered_after_s(self, moment: float) -> float | None:
        """How long after this moment the first task was accepted."""
        return next((at - moment for at in list(self.accepted_at) if at > moment), None)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with requests.Session() as session:
            while not self._stop.is_set():
                self._submit(session, secrets.token_hex(8))
                self._look(session)
                time.sleep(PAUSE_S)

    def _submit(self, session: requests.Session, key: str) -> None:
        while True:
            try:
                answer = session.post(
                    f"{self._url}/api/submit", json={"prompt": "x"}, headers={"Idempotency-Key": key}, timeout=10
                )
            except requests.RequestException:
                continue
            if answer.status_code == 202:
                self.accepted.setdefault(key, set()).add(answer.json()["task_id"])
                self.accepted_at.append(time.monotonic())
                return
            assert answer.status_code == 503, answer.text
            time.sleep(0.1)

    def _look(self, session: requests.Session) -> None:
        task_id = random.choice(self.task_ids[-50:])
        self.statuses[session.get(f"{self._url}/api/status/{task_id}", timeout=10).status_code] += 1


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with Watched(tmp_path) as watched:
        yield watched


@pytest.fixture
def over_sentinel(settings: Settings, watched: Watched) -> Settings:
    changes = {"lease_s": 3.0, "beat_s": 0.5, "workers_per_device": 2, "max_batch": 4, "simulated_image_ms": 60.0}
    return settings.model_copy(update={"redis_url": watched.url, "models": ("simulated",), **changes})


@pytest.fixture
def broker(over_sentinel: Settings) -> Iterator[Broker]:
    broker = Broker(over_sentinel, patience_s=20.0)
    yield broker
    broker.close()


def assert_all_ended_once(broker: Broker, settings: Settings, clients: Clients) -> None:
    assert set(clients.statuses) <= {200, 503}, "a task that was accepted was not known"
    assert [key for key, ids in clients.accepted.items() if len(ids) != 1] == [], "a key with two tasks"
    done = await_final(broker, clients.task_ids, within_s=60)
    for task in done:
        assert task.status is TaskStatus.SUCCEEDED, task
        assert Counter(attempt.outcome for attempt in task.attempts)["succeeded"] == 1, task
        assert len(open_storage(settings).read(task.images[0].key)) == task.images[0].bytes
    listed, _ = broker.tasks("default", status=None, limit=100_000, before=None)
    assert sorted(task.task_id for task in listed) == sorted(clients.task_ids), "one submit became two tasks"
    eventually(lambda: broker.pending() == 0)
    assert sum(queue.queued + queue.running for queue in broker.queues()) == 0


def test_a_killed_primary_under_load(broker: Broker, over_sentinel: Settings, watched: Watched, tmp_path: Path) -> None:
    with GatewayServer(over_sentinel, tmp_path / "gateway") as gateway, WorkerServer(over_sentinel, tmp_path / "log"):
        ready_workers(broker, 2)
        with Clients(gateway.url) as clients:
            eventually(lambda: len(clients.accepted) > 50, within_s=30)
            watched.primary.kill()
            killed = time.monotonic()
            eventually(lambda: clients.recovered_after_s(killed + 0.2), within_s=RECOVERY_S)
            print(f"recovered after {clients.recovered_after_s(killed + 0.2)} s")
            time.sleep(1.0)
            watched.primary.start()
            eventually(lambda: watched.followed_by(watched.primary), within_s=30)
            time.sleep(0.5)
        assert_all_ended_once(broker, over_sentinel, clients)
        assert watched.leads(watched.replica)


def test_a_replica_that_lagged_takes_over(
    broker: Broker, over_sentinel: Settings, watched: Watched, tmp_path: Path
) -> None:
    log = tmp_path / "gateway"
    with GatewayServer(over_sentinel, log) as gateway, WorkerServer(over_sentinel, tmp_path / "log"):
        ready_workers(broker, 2)
        with Clients(gateway.url) as clients:
            eventually(lambda: len(clients.accepted) > 50, within_s=30)
            watched.replica.signal(signal.SIGSTOP)
            watched.lose_touch()
            before = len(clients.accepted)
            time.sleep(0.6)
            unheard = len(clients.accepted) - before
            watched.primary.kill()
            killed = time.monotonic()
            watched.replica.signal(signal.SIGCONT)
            eventually(lambda: clients.recovered_after_s(killed + 0.2), within_s=RECOVERY_S)
            print(f"recovered after {clients.recovered_after_s(killed + 0.2)} s, {unheard} not replicated")
            time.sleep(1.0)
        assert unheard > 10
        assert_all_ended_once(broker, over_sentinel, clients)
    assert "promises_replayed" in log.read_text("utf-8"), "nothing was lost that had to be told again"


def test_primaries_that_are_demoted_alive(
    broker: Broker, over_sentinel: Settings, watched: Watched, tmp_path: Path
) -> None:
    with GatewayServer(over_sentinel, tmp_path / "gateway") as gateway, WorkerServer(over_sentinel, tmp_path / "log"):
        ready_workers(broker, 2)
        with Clients(gateway.url) as clients:
            for heir in (watched.replica, watched.primary):  # there, and back again
                eventually(partial(watched.followed_by, heir), within_s=30)
                watched.sentinels[0].client.sentinel_failover(SERVICE)
                asked = time.monotonic()
                eventually(partial(watched.leads, heir), within_s=30)
                print(f"handed over within {time.monotonic() - asked} s")
                time.sleep(2.0)
        assert_all_ended_once(broker, over_sentinel, clients)
