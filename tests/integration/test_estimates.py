"""How good estimates are: a fleet of simulated workers under steady load of two sizes, from two tenants."""

from __future__ import annotations

import itertools
import secrets
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.broker import Broker
from common.records import NewTask, Submitted
from common.schemas import TaskStatus
from common.settings import Settings
from tests.conftest import resolved
from tests.fleet import await_final, ready_workers, record
from tests.servers import WorkerServer

SIDES = (64, 192)  # pixels; 200 and 500 ms at what the fleet's model takes
MODEL = """
[simulated]
max_batch = 1
options = {megapixel_ms = 9155.0}
"""
WORKERS = 2
EVERY_S = 0.185  # a task, which takes 350 ms of one of two workers: as fast as they are done, or nearly
BACKLOG = 8
TASKS = 60
GOAL = 0.2


@pytest.fixture
def fleet(settings: Settings, broker: Broker, tmp_path: Path) -> Iterator[Broker]:
    models = tmp_path / "models.toml"
    models.write_text(MODEL)
    changes = {
        "models": ("simulated",), "models_file": models, "workers_per_device": WORKERS, "simulated_image_ms": 162.5,
        "beat_s": 0.5,
    }  # fmt: skip
    with WorkerServer(settings.model_copy(update=changes), tmp_path / "worker.log"):
        ready_workers(broker, WORKERS)
        yield broker


def submitted(broker: Broker, side: int, tenant: str) -> Submitted:
    request = resolved(width=side, height=side)
    return broker.submit(NewTask(task_id=secrets.token_hex(16), tenant=tenant, request=request))


def error_of(broker: Broker, task: Submitted) -> float:
    """|actual - estimated| / actual, by the task's record."""
    found = record(broker, task.task_id)
    assert found.status is TaskStatus.SUCCEEDED and found.finished_at and task.eta_seconds is not None
    actual = (found.finished_at - found.created_at).total_seconds()
    return abs(actual - task.eta_seconds) / actual


@pytest.mark.alone
def test_half_of_the_estimates_under_steady_load_are_within_a_fifth(fleet: Broker) -> None:
    kinds = itertools.cycle([(SIDES[0], "a"), (SIDES[1], "a"), (SIDES[1], "b"), (SIDES[0], "b")])
    await_final(fleet, [submitted(fleet, *next(kinds)).task_id for _ in range(4)])  # from which the pace is learned
    tasks = [submitted(fleet, *next(kinds)) for _ in range(BACKLOG)]
    began = time.monotonic()
    for number in range(TASKS - BACKLOG):
        time.sleep(max(0.0, began + number * EVERY_S - time.monotonic()))
        tasks.append(submitted(fleet, *next(kinds)))
    await_final(fleet, [task.task_id for task in tasks], within_s=30)
    errors = [error_of(fleet, task) for task in tasks]
    waits = [task.position for task in tasks]
    print(f"median {statistics.median(errors):.3f}, nine in ten {statistics.quantiles(errors, n=10)[-1]:.3f}, {waits}")
    assert statistics.mean(waits) > 2, "there was a queue to estimate"
    assert statistics.median(errors) <= GOAL
    told = fleet.eta_errors()["simulated"]
    within = dict(told.buckets)
    assert within["+Inf"] == TASKS
    assert within["0.2"] == pytest.approx(sum(error <= GOAL for error in errors), abs=2)
    assert told.sum == pytest.approx(sum(errors), rel=0.05)
