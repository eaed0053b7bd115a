"""A worker that serves more models than it keeps in memory: they come, go and take turns, and nobody pays twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.broker import Broker
from common.schemas import TaskRecord, TaskStatus
from common.settings import Settings
from tests.fleet import await_final, await_running, ready_workers, record, submit_many
from tests.servers import RedisServer, WorkerServer, eventually

LOAD_MS = 400.0

MODELS = f"""
[one]
source = "builtin"
pipeline = "simulated"
width = 64
height = 64
min_side = 16
run_limit_s = 1.5
options = {{faults = true, image_ms = 300.0, load_ms = {LOAD_MS}}}
[two]
source = "builtin"
pipeline = "simulated"
width = 64
height = 64
min_side = 16
options = {{faults = true, image_ms = 300.0, load_ms = {LOAD_MS}}}
"""

Change = Callable[..., Settings]


@pytest.fixture
def changed(settings: Settings, tmp_path: Path) -> Change:
    """A fleet of one worker that serves two models, which take a while to load; keywords change settings."""
    models = tmp_path / "models.toml"
    models.write_text(MODELS)

    def change(**changes: object) -> Settings:
        base = {"models": ("one", "two"), "models_file": models, "max_batch": 2, "beat_s": 0.5}
        return settings.model_copy(update=base | changes)

    return change


def told(log: Path, event: str, *fields: str) -> list[tuple[Any, ...]]:
    """These fields of the log lines of one event."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [tuple(line[name] for name in fields) for line in lines if line["event"] == event]


def loads_ms(tasks: list[TaskRecord]) -> list[float]:
    assert {task.status for task in tasks} == {TaskStatus.SUCCEEDED}
    return [task.stages.load_ms for task in tasks if task.stages is not None]


def loaded(broker: Broker) -> list[str]:
    return [model for card in broker.workers() for model in card.models_loaded]


def test_a_model_comes_on_first_use_leaves_when_idle_and_comes_again(
    broker: Broker, changed: Change, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with WorkerServer(changed(idle_unload_s=0.8), log):
        (card,) = ready_workers(broker)
        assert (list(card.models), list(card.models_loaded)) == (["one", "two"], ["one"])
        assert loads_ms(await_final(broker, submit_many(broker, 2, model="one"))) == [0.0, 0.0]
        first = sorted(loads_ms(await_final(broker, submit_many(broker, 4, model="two"))))
        assert first[:3] == [0.0] * 3 and LOAD_MS <= first[3] < LOAD_MS + 1000
        eventually(lambda: loaded(broker) == ["one"])
        (again,) = loads_ms(await_final(broker, submit_many(broker, 1, model="two")))
        assert again >= LOAD_MS
        eventually(lambda: loaded(broker) == ["one"])
        eventually(lambda: broker.workers()[0].counters["models_loaded_total"] == 3)
        counters = broker.workers()[0].counters
    assert counters["models_unloaded_total"] == 2
    causes = [("one", "prewarm"), ("two", "first_use"), ("two", "again")]
    assert told(log, "model_loaded", "model", "cause") == causes
    assert told(log, "model_unloaded", "model", "cause", "left") == [("two", "idle", 0)] * 2
    assert not told(log, "worker_died")
    assert not told(log, "worker_recycled")


def test_with_room_for_one_the_other_makes_way(broker: Broker, changed: Change, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with WorkerServer(changed(max_resident=1), log):
        ready_workers(broker)
        for model in ("two", "one"):
            (load_ms,) = loads_ms(await_final(broker, submit_many(broker, 1, model=model)))
            assert load_ms >= LOAD_MS
            eventually(lambda model=model: loaded(broker) == [model])  # type: ignore[misc]
    assert told(log, "model_unloaded", "model", "cause") == [("one", "room"), ("two", "room")]


def test_tasks_whose_model_is_in_memory_go_first_until_the_others_have_waited_enough(
    broker: Broker, changed: Change, tmp_path: Path
) -> None:
    with WorkerServer(changed(max_resident=1, resident_wait_s=1.0, max_batch=1), tmp_path / "log"):
        ready_workers(broker)
        before = submit_many(broker, 1, model="one")
        await_running(broker, before)
        (waits,) = submit_many(broker, 1, model="two")
        after = submit_many(broker, 9, model="one")
        tasks = await_final(broker, [waits, *before, *after])
    finished = [task.finished_at for task in tasks]
    overtook = sum(at < finished[0] for at in finished[2:] if at and finished[0])
    assert 1 <= overtook <= 6, "about a second's worth"
    assert [load_ms >= LOAD_MS for load_ms in loads_ms(tasks)].count(True) == 2, "one way and back"


def test_a_busy_worker_that_leaves_tasks_asks_redis_a_few_times_a_second(
    broker: Broker, changed: Change, tmp_path: Path, redis_server: RedisServer
) -> None:
    """It leaves `one`, which it would have to load, and what stands behind; neither may wake it at once again."""
    settings = changed(prewarm=("two",), resident_wait_s=60.0)
    (tmp_path / "models.toml").write_text(MODELS.replace("image_ms = 300.0", "image_ms = 4000.0"))

    def calls() -> int:
        return int(redis_server.client.info("commandstats")["cmdstat_evalsha"]["calls"])

    with WorkerServer(settings, tmp_path / "log"):
        ready_workers(broker)
        busy = submit_many(broker, 1, model="two")
        await_running(broker, busy)
        left = submit_many(broker, 1, model="one", priority="high")
        left += submit_many(broker, 1, model="two", priority="low")
        before = calls()
        time.sleep(1.0)
        assert calls() - before < 30, "claims, beats, progress, and what the supervisor does each second"
        for task_id in left:
            assert broker.cancel(task_id, "default") == "canceled"
        broker.cancel(busy[0], "default")
        await_final(broker, busy)


def test_a_load_counts_against_no_run_beside_it(broker: Broker, changed: Change, tmp_path: Path) -> None:
    """The run's limit would pass in the meantime, and so would its lease and the limit of a step."""
    log = tmp_path / "log"
    settings = changed(simulated_load_ms=0.0, lease_s=1.5, step_limit_s=1.0, resident_wait_s=0.0)
    (tmp_path / "models.toml").write_text(MODELS.replace(f"load_ms = {LOAD_MS}", "load_ms = 2500.0", 2))
    with WorkerServer(settings, log):
        ready_workers(broker)
        (beside,) = submit_many(broker, 1, model="one", steps=4)
        await_running(broker, [beside])
        (causes,) = submit_many(broker, 1, model="two")
        tasks = await_final(broker, [beside, causes])
    assert loads_ms(tasks)[1] >= 2500
    assert [len(task.attempts) for task in tasks] == [1, 1]
    assert not told(log, "worker_killed")
    assert not told(log, "fuse_tripped")


def test_a_worker_whose_model_leaves_memory_behind_is_renewed(broker: Broker, changed: Change, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with WorkerServer(changed(max_resident=1, resident_wait_s=0.2), log):
        (card,) = ready_workers(broker)
        (leaks,) = submit_many(broker, 1, model="one", prompt="a [leak] soup", steps=1)
        (other,) = submit_many(broker, 1, model="two")
        tasks = await_final(broker, [leaks, other])
        assert [after.name for after in ready_workers(broker)] != [card.name]
    assert {task.status for task in tasks} == {TaskStatus.SUCCEEDED}
    assert [attempt.outcome for attempt in record(broker, other).attempts] == ["released", "succeeded"]
    assert told(log, "unload_leaked", "model") == [("one",)]
    assert len(told(log, "worker_recycled")) == 1
    assert not told(log, "worker_died")
