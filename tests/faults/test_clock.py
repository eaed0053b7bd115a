"""Hosts whose clocks are wrong: leases, deadlines and timestamps go by Redis' clock, or by ones that only count."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

from common.broker import Broker
from common.schemas import TaskStatus
from common.settings import Settings
from tests.faults.conftest import NoteFn
from tests.faults.rig import LONG
from tests.faults.table import Count
from tests.fleet import await_final, ready_workers, submit_many
from tests.servers import Server, WorkerServer, binary

SKEW = timedelta(minutes=10)
SLACK = timedelta(seconds=2)
TASKS = 120 if LONG else 40


def with_clock(server: Server, ahead: timedelta, folder: Path) -> Server:
    """Let a server that has not started, and its children, read this much more from the wall clock."""
    library = folder / f"clock{ahead.total_seconds():+.0f}.so"
    source = Path(__file__).with_name("wrong_clock.c")
    define = f"-DAHEAD={ahead.total_seconds():.0f}L"
    subprocess.run([binary("cc"), "-shared", "-fPIC", "-nostdlib", define, "-o", str(library), str(source)], check=True)
    server.env = {**(server.env or {}), "LD_PRELOAD": str(library)}
    return server


def test_workers_with_wrong_clocks_lose_no_lease(
    broker: Broker, settings: Settings, note: NoteFn, tmp_path: Path
) -> None:
    changes = {"lease_s": 1.0, "beat_s": 0.25, "max_batch": 2, "simulated_image_ms": 600.0, "models": ("simulated",)}
    settings = settings.model_copy(update=changes)
    skews = {"ahead": SKEW, "behind": -SKEW}
    began = datetime.now(UTC)
    with (
        with_clock(WorkerServer(settings, tmp_path / "ahead"), SKEW, tmp_path),
        with_clock(WorkerServer(settings, tmp_path / "behind"), -SKEW, tmp_path),
    ):
        ready_workers(broker, 2)
        task_ids = submit_many(broker, TASKS, steps=12, deadline_s=60.0)
        count = Count.of(broker, settings, task_ids)
        done = await_final(broker, task_ids)
    ended = datetime.now(UTC)
    note("a worker's clock 10 minutes ahead, another's behind", len(skews), count)
    for name, skew in skews.items():
        first = json.loads((tmp_path / name).read_text("utf-8").splitlines()[0])
        assert abs(datetime.fromisoformat(first["time"]) - began - skew) < SLACK, "the clock was not wrong"
    assert not count.problems, count
    assert {task.status for task in done} == {TaskStatus.SUCCEEDED}
    assert Counter(a.outcome for task in done for a in task.attempts) == {"succeeded": TASKS}
    assert len({task.attempts[0].worker for task in done}) == 2, "only one of the workers took part"
    for task in done:
        (attempt,) = task.attempts
        assert task.started_at and task.finished_at and attempt.ended_at
        assert began - SLACK <= task.created_at <= task.started_at <= task.finished_at <= ended + SLACK
        assert task.started_at == attempt.started_at <= attempt.ended_at == task.finished_at
