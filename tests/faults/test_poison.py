"""Tasks that hurt: one that kills its worker, hangs, leaks or does not fit, and its neighbours that are unharmed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.broker import Broker
from common.schemas import TaskRecord, TaskStatus
from common.settings import Settings
from tests.fleet import await_final, await_running, ready_workers, record, submit_many
from tests.servers import WorkerServer, eventually

MODELS = """
[simulated]
max_batch = 4
options = {faults = true}
[quick]
source = "builtin"
pipeline = "simulated"
width = 64
height = 64
min_side = 16
max_batch = 4
run_limit_s = 0.5
options = {faults = true, image_ms = 100.0}
[broken]
source = "/nowhere/at/all"
"""

Change = Callable[..., Settings]


@pytest.fixture
def changed(settings: Settings, tmp_path: Path) -> Change:
    """A fleet of one worker that batches four simulated runs and obeys prompts that hurt; keywords change settings."""
    models = tmp_path / "models.toml"
    models.write_text(MODELS)

    def change(**changes: object) -> Settings:
        base = {"models": ("simulated",), "models_file": models, "simulated_image_ms": 300.0, "drain_s": 5.0}
        return settings.model_copy(update=base | changes)

    return change


def told(log: Path, event: str) -> list[dict[str, Any]]:
    """The log lines of one event."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def outcomes(task: TaskRecord) -> list[str]:
    return [attempt.outcome for attempt in task.attempts]


def code(task: TaskRecord) -> str | None:
    return task.error.code if task.error else None


def assert_nothing_is_held(broker: Broker) -> None:
    assert broker.pending() == 0
    assert sum(queue.queued + queue.running for queue in broker.queues()) == 0


def test_a_poison_task_is_quarantined_and_its_batch_mates_are_blamed_once(
    broker: Broker, changed: Change, tmp_path: Path
) -> None:
    before = submit_many(broker, 2, steps=8)
    (poison,) = submit_many(broker, 1, prompt="a [crash] course", steps=8)
    after = submit_many(broker, 3, steps=8)
    with WorkerServer(changed(), tmp_path / "log"):
        tasks = await_final(broker, [*before, poison, *after], within_s=60)
        ready_workers(broker)
    bad = record(broker, poison)
    assert (bad.status, code(bad), outcomes(bad)) == (TaskStatus.FAILED, "worker_crashed", ["crashed"] * 3)
    for task in tasks:
        if task.task_id != poison:
            assert task.status is TaskStatus.SUCCEEDED
            assert Counter(outcomes(task))["crashed"] <= 1, outcomes(task)
            assert outcomes(task)[-1] == "succeeded"
    assert Counter(o for task in tasks for o in outcomes(task))["crashed"] <= 3 + 3
    assert_nothing_is_held(broker)


def test_a_device_that_fails_takes_only_its_suspects_with_it(broker: Broker, changed: Change, tmp_path: Path) -> None:
    (poison,) = submit_many(broker, 1, prompt="all is [lost]")
    others = submit_many(broker, 5)
    log = tmp_path / "log"
    with WorkerServer(changed(), log):
        tasks = await_final(broker, [poison, *others], within_s=60)
    assert code(tasks[0]) == "worker_crashed"
    assert {task.status for task in tasks[1:]} == {TaskStatus.SUCCEEDED}
    assert {line["exit_code"] for line in told(log, "worker_died")} == {3}
    assert_nothing_is_held(broker)


def test_out_of_memory_fails_one_run_and_the_next_succeeds(broker: Broker, changed: Change, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with WorkerServer(changed(), log):
        (card,) = ready_workers(broker)
        (large,) = submit_many(broker, 1, prompt="far too large: [oom]")
        (crowded,) = submit_many(broker, 1, prompt="fits alone: [crowded]")
        others = submit_many(broker, 6)
        tasks = await_final(broker, [large, crowded, *others])
        assert [(task.status, code(task)) for task in tasks[:2]] == [
            (TaskStatus.FAILED, "out_of_memory"),
            (TaskStatus.SUCCEEDED, None),
        ]
        assert {(task.status, len(task.attempts)) for task in tasks[2:]} == {(TaskStatus.SUCCEEDED, 1)}
        assert [after.pid for after in ready_workers(broker)] == [card.pid]
    assert not told(log, "worker_died")
    assert_nothing_is_held(broker)


def test_a_hung_step_is_killed_within_its_budget_and_the_others_go_on(
    broker: Broker, changed: Change, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with WorkerServer(changed(step_limit_s=1.0), log):
        ready_workers(broker)
        (hung,) = submit_many(broker, 1, prompt="a [hang] glider")
        others = submit_many(broker, 4)
        await_running(broker, others)
        tasks = await_final(broker, [hung, *others])
    assert (code(tasks[0]), outcomes(tasks[0])) == ("worker_crashed", ["crashed"] * 3)
    for task in tasks[1:]:
        assert task.status is TaskStatus.SUCCEEDED
        assert Counter(outcomes(task))["crashed"] <= 1
    assert [line["cause"] for line in told(log, "worker_killed")] == ["step_limit"] * 3
    assert_nothing_is_held(broker)


def test_a_hung_call_loses_its_lease_though_the_threads_still_beat(
    broker: Broker, changed: Change, tmp_path: Path
) -> None:
    """With a supervisor that does not act, another machine's takes the run back."""
    settings = changed(lease_s=1.5, beat_s=0.3, step_limit_s=1.0)
    with WorkerServer(settings, tmp_path / "log") as server:
        (card,) = ready_workers(broker)
        (hung,) = submit_many(broker, 1, prompt="a [hang] glider")
        eventually(lambda: record(broker, hung).status is TaskStatus.RUNNING)
        psutil.Process(server.pid).suspend()
        try:
            time.sleep(settings.step_limit_s + settings.lease_s + 0.5)
            assert card.name in [living.name for living in broker.workers()], "it still beats"
            other = Broker(settings)  # another machine's, with this fleet's lease
            assert other.reap() == [], "nobody had looked for as long as an outage would take"
            time.sleep(settings.lease_s + 0.3)
            assert [(reaped.task_id, reaped.outcome) for reaped in other.reap()] == [(hung, "requeued")]
            assert outcomes(record(broker, hung)) == ["lost"]
            assert broker.cancel(hung, "default") == "canceled"
        finally:
            psutil.Process(server.pid).resume()


@pytest.mark.parametrize(
    ("prompt", "cause", "changes"),
    [
        ("a slow picture", "run_limit", {"model": "quick"}),
        ("a [hang] glider", "run_limit", {"model": "quick"}),
        ("a slow picture", "deadline", {"deadline_s": 0.5}),
        ("a [hang] glider", "deadline", {"deadline_s": 0.5}),
    ],
)
def test_a_fuse_trips_once_and_says_so(
    broker: Broker, changed: Change, tmp_path: Path, prompt: str, cause: str, changes: dict[str, object]
) -> None:
    """Between two steps by the worker itself; in a step that hangs by the supervisor's kill."""
    log = tmp_path / "log"
    image_ms = 5_000.0
    models = tmp_path / "models.toml"
    models.write_text(MODELS.replace("image_ms = 100.0", f"image_ms = {image_ms}"))
    with WorkerServer(changed(models=("simulated", "quick"), simulated_image_ms=image_ms), log):
        ready_workers(broker)
        began = time.monotonic()
        (late,) = submit_many(broker, 1, prompt=prompt, steps=50, **changes)
        (task,) = await_final(broker, [late], within_s=15)
        took_s = time.monotonic() - began
    assert (task.status, code(task), outcomes(task)) == (TaskStatus.FAILED, "deadline_exceeded", ["failed"])
    assert [(line["task_id"], line["cause"]) for line in told(log, "fuse_tripped")] == [(late, cause)]
    assert took_s < 5
    assert bool(told(log, "worker_killed")) == ("[hang]" in prompt)
    assert_nothing_is_held(broker)


def test_a_worker_whose_memory_drifts_is_renewed_between_runs(broker: Broker, changed: Change, tmp_path: Path) -> None:
    log = tmp_path / "log"
    leaking = changed(drift_window_s=4.0, drift_warmup_s=0.0, simulated_image_ms=200.0)
    with WorkerServer(leaking, log):
        (card,) = ready_workers(broker)
        task_ids = []
        until = time.monotonic() + 30
        while not (log.exists() and told(log, "worker_recycled")):
            assert time.monotonic() < until, "the drift was not noticed"
            task_ids += submit_many(broker, 1, prompt="a [leak] soup", steps=1)
            time.sleep(0.25)
        task_ids += submit_many(broker, 6)
        tasks = await_final(broker, task_ids)
        eventually(lambda: card.name not in [after.name for after in ready_workers(broker)], within_s=20)
    assert {task.status for task in tasks} == {TaskStatus.SUCCEEDED}
    assert {outcome for task in tasks for outcome in outcomes(task)} <= {"released", "succeeded"}
    (line,) = told(log, "worker_recycled")
    assert line["cause"] == "rss memory"
    assert line["grown_mb"] > 200
    assert not told(log, "worker_died")


def test_a_model_that_fails_to_load_leaves_the_others_of_its_worker_at_work(
    broker: Broker, changed: Change, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with WorkerServer(changed(models=("broken", "simulated")), log):
        (card,) = ready_workers(broker)
        assert list(card.models) == ["simulated"]
        (waits,) = submit_many(broker, 1, model="broken")
        tasks = await_final(broker, submit_many(broker, 4))
        assert {task.status for task in tasks} == {TaskStatus.SUCCEEDED}
        assert record(broker, waits).status is TaskStatus.QUEUED
        assert broker.cancel(waits, "default") == "canceled"
    (line,) = told(log, "model_load_failed")
    assert "/nowhere/at/all" in line["message"]


def test_a_worker_stuck_in_a_call_does_not_outlive_its_supervisor(
    broker: Broker, changed: Change, tmp_path: Path
) -> None:
    server = WorkerServer(changed(drain_s=0.5, lease_s=3.0, beat_s=0.5), tmp_path / "log").start()
    (card,) = ready_workers(broker)
    (hung,) = submit_many(broker, 1, prompt="a [hang] glider")
    eventually(lambda: record(broker, hung).status is TaskStatus.RUNNING)
    child = psutil.Process(card.pid)
    server.kill()
    child.wait(20)
