"""Tasks that hurt: one that kills its worker, hangs, leaks or does not fit, and its neighbours that are unharmed."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.broker import Broker
from common.schemas import TaskRecord, TaskStatus
from common.settings import Settings
from common.storage.base import attempt_folder
from tests.faults.conftest import NoteFn
from tests.faults.rig import LONG
from tests.faults.table import Count
from tests.fleet import await_final, await_running, ready_workers, record, submit_many
from tests.servers import WorkerServer, eventually

ROUNDS = 3 if LONG else 1

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


def replaced_after_s(log: Path) -> list[float]:
    """For each worker that died, how long it took until the next one was ready. There must be one slot only."""
    gaps, died = [], None
    for line in (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")):
        at = datetime.fromisoformat(line["time"]).timestamp()
        if line["event"] == "worker_died":
            died = at
        elif line["event"] == "worker_ready" and died is not None:
            gaps.append(at - died)
            died = None
    return gaps


def outcomes(task: TaskRecord) -> list[str]:
    return [attempt.outcome for attempt in task.attempts]


def code(task: TaskRecord) -> str | None:
    return task.error.code if task.error else None


def assert_nothing_is_held(broker: Broker) -> None:
    assert broker.pending() == 0
    assert sum(queue.queued + queue.running for queue in broker.queues()) == 0


def test_a_poison_task_is_quarantined_and_its_batch_mates_are_blamed_once(
    broker: Broker, changed: Change, note: NoteFn, tmp_path: Path
) -> None:
    settings, log, task_ids = changed(), tmp_path / "log", list[str]()
    poisons: dict[str, list[str]] = {}  # with those that share its batch
    for _ in range(ROUNDS):
        before = submit_many(broker, 2, steps=8)
        (poison,) = submit_many(broker, 1, prompt="a [crash] course", steps=8)
        poisons[poison] = [*before, *submit_many(broker, 3, steps=8)]
        task_ids += [poison, *poisons[poison]]
        with WorkerServer(settings, log):
            count = Count.of(broker, settings, task_ids)
            ready_workers(broker)
    note("a task that kills its worker three times", ROUNDS, count, replaced_after_s(log))
    for poison, mates in poisons.items():
        bad, tasks = record(broker, poison), [record(broker, task_id) for task_id in mates]
        assert (bad.status, code(bad), outcomes(bad)) == (TaskStatus.FAILED, "worker_crashed", ["crashed"] * 3)
        for task in tasks:
            assert task.status is TaskStatus.SUCCEEDED
            assert Counter(outcomes(task))["crashed"] <= 1, outcomes(task)
            assert outcomes(task)[-1] == "succeeded"
        assert Counter(o for task in tasks for o in outcomes(task))["crashed"] <= 3
    assert not count.problems, count
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


def test_out_of_memory_fails_one_run_and_the_next_succeeds(
    broker: Broker, changed: Change, note: NoteFn, tmp_path: Path
) -> None:
    settings, log, task_ids = changed(), tmp_path / "log", list[str]()
    with WorkerServer(settings, log):
        (card,) = ready_workers(broker)
        for _ in range(ROUNDS):
            (large,) = submit_many(broker, 1, prompt="far too large: [oom]")
            (crowded,) = submit_many(broker, 1, prompt="fits alone: [crowded]")
            mine = [large, crowded, *submit_many(broker, 6)]
            task_ids += mine
            tasks = await_final(broker, mine)
            assert [(task.status, code(task)) for task in tasks[:2]] == [
                (TaskStatus.FAILED, "out_of_memory"),
                (TaskStatus.SUCCEEDED, None),
            ]
            assert {(task.status, len(task.attempts)) for task in tasks[2:]} == {(TaskStatus.SUCCEEDED, 1)}
        count = Count.of(broker, settings, task_ids)
        assert [after.pid for after in ready_workers(broker)] == [card.pid]
    note("out of memory, simulated", 2 * ROUNDS, count)
    assert not count.problems, count
    assert not told(log, "worker_died")
    assert_nothing_is_held(broker)


def test_a_hung_step_is_killed_within_its_budget_and_the_others_go_on(
    broker: Broker, changed: Change, note: NoteFn, tmp_path: Path
) -> None:
    settings, log, task_ids = changed(step_limit_s=1.0), tmp_path / "log", list[str]()
    with WorkerServer(settings, log):
        for _ in range(ROUNDS):
            ready_workers(broker)
            (hung,) = submit_many(broker, 1, prompt="a [hang] glider")
            others = submit_many(broker, 4)
            task_ids += [hung, *others]
            await_running(broker, others)
            tasks = await_final(broker, [hung, *others])
            assert (code(tasks[0]), outcomes(tasks[0])) == ("worker_crashed", ["crashed"] * 3)
            for task in tasks[1:]:
                assert task.status is TaskStatus.SUCCEEDED
                assert Counter(outcomes(task))["crashed"] <= 1
        count = Count.of(broker, settings, task_ids)
    note("a step that hangs, thrice", ROUNDS, count, replaced_after_s(log))
    assert [line["cause"] for line in told(log, "worker_killed")] == ["step_limit"] * 3 * ROUNDS
    assert not count.problems, count
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
    image_ms = 10_000.0
    models = tmp_path / "models.toml"
    models.write_text(MODELS.replace("image_ms = 100.0", f"image_ms = {image_ms}"))
    with WorkerServer(changed(models=("simulated", "quick"), simulated_image_ms=image_ms), log):
        ready_workers(broker)
        began = time.monotonic()
        (late,) = submit_many(broker, 1, prompt=prompt, steps=50, **changes)
        (task,) = await_final(broker, [late], within_s=30)
        took_s = time.monotonic() - began
    assert (task.status, code(task), outcomes(task)) == (TaskStatus.FAILED, "deadline_exceeded", ["failed"])
    assert [(line["task_id"], line["cause"]) for line in told(log, "fuse_tripped")] == [(late, cause)]
    assert took_s < 9, "it was not painted to its end"
    assert bool(told(log, "worker_killed")) == ("[hang]" in prompt)
    assert_nothing_is_held(broker)


def test_a_worker_whose_memory_drifts_is_renewed_between_runs(broker: Broker, changed: Change, tmp_path: Path) -> None:
    log = tmp_path / "log"
    leaking = changed(drift_window_s=2.0, drift_warmup_s=0.0, simulated_image_ms=200.0)
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
    broker: Broker, changed: Change, note: NoteFn, tmp_path: Path
) -> None:
    settings, log, task_ids = changed(models=("broken", "simulated")), tmp_path / "log", list[str]()
    for _ in range(ROUNDS):
        with WorkerServer(settings, log):
            (card,) = ready_workers(broker)
            assert list(card.models) == ["simulated"]
            (waits,) = submit_many(broker, 1, model="broken")
            others = submit_many(broker, 4)
            task_ids += [waits, *others]
            assert {task.status for task in await_final(broker, others)} == {TaskStatus.SUCCEEDED}
            assert record(broker, waits).status is TaskStatus.QUEUED
            assert broker.cancel(waits, "default") == "canceled"
            count = Count.of(broker, settings, task_ids)
    note("a model that fails to load", ROUNDS, count)
    lines = told(log, "model_load_failed")
    assert len(lines) == ROUNDS and all("/nowhere/at/all" in line["message"] for line in lines)
    assert not count.problems, count


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


def test_a_storage_that_hangs_ends_its_worker_and_blames_nobody(
    broker: Broker, changed: Change, tmp_path: Path
) -> None:
    """A pipe that nobody reads stands where the picture is to be written, as a file server that is gone."""
    settings, log = changed(step_limit_s=1.0, simulated_image_ms=1_500.0), tmp_path / "log"
    with WorkerServer(settings, log):
        (card,) = ready_workers(broker)
        (hung,) = submit_many(broker, 1)
        await_running(broker, [hung])
        folder = settings.results_dir / attempt_folder(card.name, hung, 1, datetime.now(UTC).date())
        folder.mkdir(parents=True)
        os.mkfifo(folder / f"0.png.{card.pid}.partial")
        others = submit_many(broker, 5)
        tasks = await_final(broker, [hung, *others])
    assert {task.status for task in tasks} == {TaskStatus.SUCCEEDED}
    assert {outcome for task in tasks for outcome in outcomes(task)} == {"released", "succeeded"}
    assert [line["cause"] for line in told(log, "worker_killed")] == ["store_limit"]
    assert not list(settings.results_dir.rglob("*.partial"))
    assert_nothing_is_held(broker)
