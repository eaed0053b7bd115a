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
from tests.faults.conftest import NoteFn
from tests.faults.rig import LONG
from tests.faults.sentinel import FAILOVER_TIMEOUT_MS, SERVICE, Watched
from tests.faults.table import Count
from tests.fleet import await_final, ready_workers
from tests.servers import GatewayServer, WorkerServer, eventually

CLIENTS = 3
PAUSE_S = 0.02  # between two submits of a client
RECOVERY_S = 15.0
HANDOVERS = 2 if LONG else 1  # there, and back again


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

    def await_recovery(self, moment: float) -> float:
        """Wait until a task is accepted after this moment, and after what was under way then; return the seconds."""
        under_way_s = 0.2
        eventually(lambda: self.recovered_after_s(moment + under_way_s), within_s=RECOVERY_S)
        return under_way_s + (self.recovered_after_s(moment + under_way_s) or 0.0)

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


def counted(broker: Broker, settings: Settings, clients: Clients) -> Count:
    """Count with one task for each key; a second one is one that nobody submitted.

    A task whose end was in the lost tail of writes is made again. What the first run stored is named by no record then,
    and no client can see it, but it is on the disk until its retention is over: that is counted as doubled.
    """
    return Count.of(broker, settings, [min(ids) for ids in clients.accepted.values()])


def test_a_killed_primary_under_load(
    broker: Broker, over_sentinel: Settings, watched: Watched, note: NoteFn, tmp_path: Path
) -> None:
    servers, recovery_s = [watched.primary, watched.replica], []
    with GatewayServer(over_sentinel, tmp_path / "gateway") as gateway, WorkerServer(over_sentinel, tmp_path / "log"):
        ready_workers(broker, 2)
        with Clients(gateway.url) as clients:
            eventually(lambda: len(clients.accepted) > 50, within_s=30)
            for again in range(HANDOVERS):
                leader, heir = servers
                if again:
                    eventually(partial(watched.followed_by, heir), within_s=30)
                    time.sleep(2 * FAILOVER_TIMEOUT_MS / 1000)  # Sentinels let so long pass between two failovers
                leader.kill()
                recovery_s.append(clients.await_recovery(time.monotonic()))
                time.sleep(1.0)
                leader.start()  # and takes itself for the primary, until a Sentinel tells it otherwise
                time.sleep(1.5)
                servers.reverse()
        count = counted(broker, over_sentinel, clients)
        note("kill -9 of the primary Redis, failover by Sentinel", HANDOVERS, count, recovery_s)
        assert_all_ended_once(broker, over_sentinel, clients)
        assert watched.leads(servers[0])
        assert not count.lost, count


def test_a_replica_that_lagged_takes_over(
    broker: Broker, over_sentinel: Settings, watched: Watched, note: NoteFn, tmp_path: Path
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
            eventually(lambda: len(clients.accepted) - before > 10)
            watched.primary.kill()
            killed = time.monotonic()
            watched.replica.signal(signal.SIGCONT)
            recovery_s = clients.await_recovery(killed)
            time.sleep(1.0)
        count = counted(broker, over_sentinel, clients)
        note("kill -9 of the primary Redis, its replica behind by 0.6 s", 1, count, [recovery_s])
        assert_all_ended_once(broker, over_sentinel, clients)
        assert not count.lost, count
    assert "promises_replayed" in log.read_text("utf-8"), "nothing was lost that had to be told again"


def test_primaries_that_are_demoted_alive(
    broker: Broker, over_sentinel: Settings, watched: Watched, note: NoteFn, tmp_path: Path
) -> None:
    handover_s = []
    with GatewayServer(over_sentinel, tmp_path / "gateway") as gateway, WorkerServer(over_sentinel, tmp_path / "log"):
        ready_workers(broker, 2)
        with Clients(gateway.url) as clients:
            for heir in (watched.replica, watched.primary)[:HANDOVERS]:
                eventually(partial(watched.followed_by, heir), within_s=30)
                watched.sentinels[0].client.sentinel_failover(SERVICE)
                asked = time.monotonic()
                eventually(partial(watched.leads, heir), within_s=30)
                handover_s.append(time.monotonic() - asked)
                time.sleep(2.0)
        count = counted(broker, over_sentinel, clients)
        note("the primary Redis demoted alive by Sentinel", HANDOVERS, count, handover_s)
        assert_all_ended_once(broker, over_sentinel, clients)
        assert not count.lost, count
