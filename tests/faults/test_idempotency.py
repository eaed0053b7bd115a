"""The processes that answer are killed in the middle of submits: each Idempotency-Key is one task, each 202 is kept."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import NoteFn
from tests.faults.rig import LONG, Rig, kill_all, within
from tests.servers import eventually

KILLS = 40 if LONG else 10
BETWEEN_S = 0.4
RATE_S = 80
BACK_S = 20.0


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path, gateway_workers=2, simulated_image_ms=10.0) as rig:
        yield rig


def serving(rig: Rig) -> list[psutil.Process]:
    """The processes that answer; gunicorn starts them anew when they die."""
    return psutil.Process(rig.gateway.pid).children()


def test_killed_processes_of_a_gateway(rig: Rig, note: NoteFn) -> None:
    rig.supervise()
    recovery_s = []
    with rig.load(rate_s=RATE_S, clients=8, backlog=400) as load:
        eventually(lambda: rig.ledger.accepted, within_s=BACK_S)
        for kill in range(KILLS):
            time.sleep(BETWEEN_S)
            eventually(lambda: len(serving(rig)) == 2, within_s=BACK_S)
            doomed = serving(rig)
            kill_all(doomed if kill % 2 else doomed[:1])
            since = time.time()
            within(lambda: max(rig.ledger.accepted_at.values()) > since, BACK_S)  # noqa: B023 (called at once)
            recovery_s.append(time.time() - since)
    report = rig.close_books(load)
    note("kill -9 of the gateway's processes in the middle of submits", KILLS, report, recovery_s)
    assert rig.ledger.unanswered, "no submit met a fault"
    assert report.balanced, report
    listed, _ = rig.broker.tasks("default", status=None, limit=100_000, before=None)
    records = [record for task in listed if (record := rig.broker.view(task.task_id))]
    tasks_of = Counter(record.request.metadata["key"] for record in records)
    assert set(tasks_of.values()) == {1}, "a key that is two tasks"
    assert tasks_of.keys() == rig.ledger.sent.keys()
    assert {record.task_id for record in records} == rig.ledger.accepted.keys(), "a task that no client was told of"
