"""What is taken back, and when, on a real Redis that is now and then out of reach."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime

import pytest

from common.broker import Broker
from common.errors import RedisUnavailable, StorageError
from common.schemas import TaskStatus
from common.settings import Settings
from common.storage import open_storage
from common.storage.base import attempt_folder
from tests.conftest import SubmitFn
from worker.heartbeat import InHand
from worker.reaper import Burial, Reaper


@pytest.fixture
def reaper(settings: Settings) -> Reaper:
    return Reaper(Broker(settings, patience_s=0.0), open_storage(settings))


def test_a_dead_workers_runs_are_taken_back_even_if_redis_was_away(
    reaper: Reaper, broker: Broker, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit()
    reap = reaper._broker.reap

    def away(*_: object, **__: object) -> list[object]:
        raise RedisUnavailable("away")

    reaper.tick()
    broker.claim("w1", "cpu", ["simulated"], 1)
    monkeypatch.setattr(reaper._broker, "reap", away)
    reaper.bury(Burial("w1"))
    assert broker.queues()[0].running == 1
    monkeypatch.setattr(reaper._broker, "reap", reap)
    reaper.tick()
    assert (broker.queues()[0].running, broker.queues()[0].queued) == (0, 1)


def test_a_task_whose_limit_its_worker_was_killed_for_fails_and_its_neighbours_go_on(
    reaper: Reaper, broker: Broker, submit: SubmitFn
) -> None:
    late, beside, waiting = submit(), submit(), submit()
    broker.claim("w1", "cpu", ["simulated"], 3)
    on_device = [InHand(task_id, 1, math.inf, "run_limit") for task_id in (late, beside)]
    reaper.bury(Burial("w1", suspects=on_device[1:], tripped=on_device[:1]))
    records = [broker.view(task_id) for task_id in (late, beside, waiting)]
    assert [record.status for record in records if record] == [TaskStatus.FAILED, TaskStatus.QUEUED, TaskStatus.QUEUED]
    assert [record.attempts[0].outcome for record in records if record] == ["failed", "crashed", "released"]
    assert records[0] is not None
    assert records[0].error is not None
    assert records[0].error.code == "deadline_exceeded"


def test_what_a_dead_worker_stored_and_never_committed_is_removed(
    reaper: Reaper, broker: Broker, settings: Settings, submit: SubmitFn
) -> None:
    task_id = submit()
    storage = open_storage(settings)
    today = datetime.now(UTC).date()
    keys = [f"{attempt_folder(worker, task_id, 1, today)}/0.png" for worker in ("w1", "w2")]
    for key in keys:
        storage.put(key, b"pixels")
    reaper.tick()
    broker.claim("w1", "cpu", ["simulated"], 1)
    reaper.bury(Burial("w1"))
    reaper.finish()
    with pytest.raises(StorageError):
        storage.read(keys[0])
    assert storage.read(keys[1]) == b"pixels"


def test_a_task_past_its_deadline_is_ended_with_no_worker_about(
    reaper: Reaper, broker: Broker, submit: SubmitFn
) -> None:
    task_id = submit(deadline_s=0.001)
    reaper.tick()
    time.sleep(0.01)
    reaper._next_reap = 0.0
    reaper.tick()
    record = broker.view(task_id)
    assert record is not None
    assert record.status is TaskStatus.EXPIRED


def test_a_supervisor_keeps_the_fleets_history_and_tells_of_its_disk(reaper: Reaper, broker: Broker) -> None:
    for _ in range(2):
        reaper.tick()
    reaper.finish()
    assert len(broker._samples("15m")) == 1
    (disk,) = broker.disks().values()
    assert 0 < disk.free < disk.size


def test_only_a_death_that_nobody_asked_for_is_a_crash(reaper: Reaper, broker: Broker) -> None:
    reaper.bury(Burial("w1", crashed=False))
    assert "crashes" not in broker.counts()
    reaper.bury(Burial("w2"))
    assert broker.counts()["crashes"] == 1


def test_a_fuse_that_the_supervisor_tripped_counts_by_its_cause(
    reaper: Reaper, broker: Broker, submit: SubmitFn
) -> None:
    late = submit()
    broker.claim("w1", "cpu", ["simulated"], 1)
    reaper.bury(Burial("w1", tripped=[InHand(late, 1, math.inf, "run_limit")]))
    assert broker.counts()["fuses|run_limit"] == 1
