"""Workers of one model with different memory: what is too large for one waits for another that can make it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.broker import Broker
from common.cards import WorkerCard
from common.schemas import TaskStatus
from common.settings import Settings
from tests.fleet import await_final, ready_workers, record, submit_many
from tests.servers import RedisServer, WorkerServer

LARGE = {"model": "pico", "width": 256, "height": 256}
SMALL = {"model": "pico", "width": 64, "height": 64}


@pytest.fixture
def small(settings: Settings, tmp_path: Path) -> WorkerServer:
    """A worker that has memory for about 150 x 150 pixels of pico's."""
    changes: dict[str, object] = {"models": ("pico",), "memory_limit_mb": 40, "beat_s": 0.2}
    return WorkerServer(settings.model_copy(update=changes), tmp_path / "small.log")


def test_the_larger_worker_makes_what_is_too_large_for_the_smaller(
    broker: Broker, settings: Settings, small: WorkerServer, tmp_path: Path
) -> None:
    large = WorkerServer(settings.model_copy(update={"models": ("pico",)}), tmp_path / "large.log")
    with small:
        (card,) = ready_workers(broker)
        assert 0 < card.max_pixels["pico"] < 256 * 256
        with large:
            ready_workers(broker, 2)
            ids = [task_id for _ in range(4) for size in (LARGE, SMALL) for task_id in submit_many(broker, 1, **size)]
            tasks = await_final(broker, ids)
    assert [task.status for task in tasks] == [TaskStatus.SUCCEEDED] * 8
    assert card.name not in {task.attempts[0].worker for task in tasks if task.request.width == 256}


def test_a_small_worker_waits_for_a_larger_one_quietly_and_no_longer_than_there_is_one(
    broker: Broker,
    settings: Settings,
    small: WorkerServer,
    card: Callable[[str], WorkerCard],
    redis_server: RedisServer,
) -> None:
    hasty = Broker(settings.model_copy(update={"beat_s": 1.0}))  # its cards are soon forgotten
    larger = card("larger").model_copy(update={"models": ["pico"], "max_pixels": {"pico": 256 * 256}})

    def calls() -> int:
        return int(redis_server.client.info("commandstats")["cmdstat_evalsha"]["calls"])

    with small:
        ready_workers(broker)
        hasty.beat(larger, [], 60)
        time.sleep(2.5)  # until it is known to the small one
        hasty.beat(larger, [], 60)
        (large,) = submit_many(broker, 1, **LARGE)
        before = calls()
        time.sleep(1.0)
        assert calls() - before < 30, "claims, beats, and what the supervisor does each second"
        (task,) = await_final(broker, submit_many(broker, 1, **SMALL))
        assert task.status is TaskStatus.SUCCEEDED
        assert record(broker, large).status is TaskStatus.QUEUED
        (task,) = await_final(broker, [large], within_s=30)  # the larger one beats no more
    assert task.error is not None and task.error.code == "out_of_memory"
