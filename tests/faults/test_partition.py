"""A worker's host that is cut off: its runs go elsewhere, it drops them by itself, and once healed it works again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from common.broker import Broker
from common.schemas import TaskStatus
from common.settings import Settings
from common.storage import open_storage
from tests.faults.conftest import NoteFn
from tests.faults.netns import Host
from tests.faults.rig import LONG, within
from tests.faults.table import Count
from tests.fleet import await_final, ready_workers, record, submit_many
from tests.servers import RedisServer, WorkerServer, eventually

LEASE_S = 2.0
SLACK_S = 0.5  # for a busy machine
PARTITIONS = 3 if LONG else 1
TASKS = 4  # two for each worker; what was lost is run alone, one after the other


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def redis_on_both(host: Host, tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that this host and the other one can reach."""
    (tmp_path / "redis").mkdir()
    options = ("--bind", f"127.0.0.1 {host.near_address}", "--protected-mode", "no")
    with RedisServer(tmp_path / "redis", *options) as server:
        yield server


@pytest.fixture
def near(settings: Settings, redis_on_both: RedisServer) -> Settings:
    changes = {"lease_s": LEASE_S, "beat_s": 0.4, "max_batch": 4, "simulated_image_ms": 3_000.0}
    return settings.model_copy(update={"redis_url": redis_on_both.url, "models": ("simulated",), **changes})


@pytest.fixture
def far(near: Settings, host: Host, redis_on_both: RedisServer) -> Settings:
    """The settings of workers on the other host; storage is shared, as by NFS."""
    return near.model_copy(update={"redis_url": f"redis://{host.near_address}:{redis_on_both.port}/0"})


def test_runs_of_a_cut_off_worker_go_elsewhere_and_end_once(
    host: Host, near: Settings, far: Settings, note: NoteFn, tmp_path: Path
) -> None:
    changes = {"simulated_image_ms": 2_000.0, "max_batch": 2}
    near, far = near.model_copy(update=changes), far.model_copy(update=changes)
    broker = Broker(near)
    task_ids: list[str] = []
    recovery_s: list[float] = []
    with host.run_here(WorkerServer(far, tmp_path / "far")):
        (cut_off,) = ready_workers(broker, 1)
        with WorkerServer(near, tmp_path / "near"):
            for _ in range(PARTITIONS):
                eventually(lambda: len([card for card in broker.workers() if card.state == "idle"]) == 2, within_s=60)
                mine = submit_many(broker, TASKS, steps=50)
                task_ids += mine
                eventually(lambda: len(running_on(broker, mine, cut_off.name)) > 1)  # noqa: B023 (called at once)
                taken = running_on(broker, mine, cut_off.name)
                host.pull_cable()
                recovery_s.append(within(lambda: not running_on(broker, mine, cut_off.name), 2 * LEASE_S + 5))  # noqa: B023
                done = await_final(broker, mine, within_s=40)
                host.plug_cable()
                assert {task.status for task in done} == {TaskStatus.SUCCEEDED}
                for task in done:
                    outcomes = [(a.outcome, a.worker == cut_off.name) for a in task.attempts]
                    assert outcomes[-1] == ("succeeded", False)
                    lost = [("lost", True)]  # also where it had claimed a task and not begun
                    assert outcomes[:-1] in ([lost] if task.task_id in taken else [lost, []])
                eventually(lambda: cut_off.name in [card.name for card in broker.workers() if card.state == "idle"])
        (again,) = submit_many(broker, 1)
        (task,) = await_final(broker, [again])
        assert [(a.worker, a.outcome) for a in task.attempts] == [(cut_off.name, "succeeded")]
    count = Count.of(broker, near, [*task_ids, again])
    note("a worker's host cut off past its lease, then healed", PARTITIONS, count, recovery_s)
    visible = {record(broker, task_id).images[0].key for task_id in [*task_ids, again]}
    assert all(open_storage(near).read(key) for key in visible)
    files = [path for path in near.results_dir.rglob("*") if path.is_file()]
    assert len(files) == len(visible) == TASKS * PARTITIONS + 1, "a result that nobody sees is left over"
    assert not count.problems, count
    broker.close()


def test_a_cut_off_worker_drops_its_runs_before_anyone_else_may_have_them(
    host: Host, near: Settings, far: Settings, tmp_path: Path
) -> None:
    broker = Broker(near)
    log = tmp_path / "far"
    with host.run_here(WorkerServer(far, log)):
        (card,) = ready_workers(broker, 1)
        task_ids = submit_many(broker, 2, steps=60)
        eventually(lambda: all(record(broker, task_id).step for task_id in task_ids))
        cut = time.time()
        host.pull_cable()
        eventually(lambda: len(fenced(log)) == 2, within_s=LEASE_S)
        host.plug_cable()
        for line in fenced(log):
            assert line["worker"] == card.name
            after_s = datetime.fromisoformat(str(line["time"])).timestamp() - cut
            assert after_s < LEASE_S * 2 / 3 + SLACK_S
        assert {line["task_id"] for line in fenced(log)} == set(task_ids)
        for task in await_final(broker, task_ids):
            assert [a.outcome for a in task.attempts] in (["lost", "succeeded"], ["released", "succeeded"])
    assert sum(path.is_file() for path in near.results_dir.rglob("*")) == 2
    broker.close()


def running_on(broker: Broker, task_ids: list[str], worker: str) -> set[str]:
    """Those of the tasks that this worker has begun, as far as is known here."""
    tasks = [record(broker, task_id) for task_id in task_ids]
    running = [task for task in tasks if task.status is TaskStatus.RUNNING and task.step]
    return {task.task_id for task in running if task.attempts[-1].worker == worker}


def fenced(log: Path) -> list[dict[str, object]]:
    """The log's lines that say that a worker dropped a run because it could not renew its lease."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == "fenced"]
