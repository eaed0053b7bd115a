"""How the engine goes about several models: loads between steps, turns, waits for room and for memory."""

from __future__ import annotations

import time
from typing import Any

import pytest

from common.errors import DeviceFailed
from common.records import Claimed, Verdict
from tests.conftest import resolved
from tests.unit.worker.fleet_of_models import Device, Made, catalogue, device
from worker.engine import Engine
from worker.heartbeat import Heartbeat, Stage
from worker.held import HeldTask
from worker.pipelines.base import Tuning
from worker.residency import Residency

MODELS = ("a", "b", "c")


class Bench:
    """An engine over a Residency of made-up models, with what it retired."""

    def __init__(self, limit: int = 4, *, run_limit_s: float | None = None, **options: Any) -> None:
        self.residency = Residency(catalogue(*MODELS), device="cpu", tuning=Tuning(embeds_bytes=0), **options)
        self.heartbeat = Heartbeat()
        self.retired: list[HeldTask] = []
        self.engine = Engine(
            models=self.residency,
            batch_limits=dict.fromkeys(MODELS, limit),
            retire=self.retire,
            run_limits=dict.fromkeys(MODELS, run_limit_s) if run_limit_s else None,  # type: ignore[arg-type]
            heartbeat=self.heartbeat,
        )

    def retire(self, task: HeldTask) -> None:
        task.stored = True
        self.retired.append(task)

    def offer(self, seed: int, model: str, **changes: object) -> HeldTask:
        claimed = Claimed(
            task_id=f"task{seed}", fence=1, queue="q", request=resolved(seed=seed, model=model, **changes),
            request_id="", queued_ms=0, deadline_in_s=None,
        )  # fmt: skip
        task = HeldTask(claimed=claimed, deadline=None)
        self.engine.offer(task)
        return task

    def run(self) -> None:
        while self.engine.turn(0):
            pass


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Device:
    return device(monkeypatch)


def test_only_the_task_that_caused_a_load_pays_for_it_and_pays_once(world: Device) -> None:
    world.load_s = 0.05
    bench = Bench()
    first, second = bench.offer(1, "a", n=3), bench.offer(2, "a")
    bench.run()
    later = bench.offer(3, "a")
    bench.run()
    assert 0.05 <= first.load_s < 0.5
    assert (second.load_s, later.load_s, world.loads) == (0.0, 0.0, ["a"])
    assert first.busy_s >= first.load_s
    assert first.denoise_s < 0.05, "the load is not counted twice"


def test_a_model_stays_between_the_pictures_of_a_task(world: Device) -> None:
    bench = Bench(limit=1, max_resident=1)
    task, other = bench.offer(1, "a", n=3, steps=1), bench.offer(2, "b", steps=1)
    bench.run()
    assert world.loads == ["a", "b"]
    assert [task.outcome, other.outcome] == ["succeeded", "succeeded"]
    assert world.steps == [("a", [1]), ("a", [2]), ("a", [3]), ("b", [2])]


def test_a_load_is_seen_as_such_and_counts_against_no_picture(world: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(run_limit_s=0.15)
    running = bench.offer(1, "a", steps=3)
    bench.engine.turn(0)
    fuse = running.fuses[0]
    seen: list[object] = []
    load = Made.load

    def watched(pipeline: Made) -> None:
        time.sleep(0.2)
        reading = bench.heartbeat.read()
        seen.extend((reading.stage, [entry.task_id for entry in reading.on_device], bench.heartbeat.standing_s()))
        load(pipeline)

    monkeypatch.setattr(Made, "load", watched)
    other = bench.offer(2, "b", steps=1)
    bench.run()
    assert seen == [Stage.LOADING, ["task2"], 0.0]
    assert fuse < time.monotonic()
    assert (running.outcome, other.outcome) == ("succeeded", "succeeded")
    assert running.busy_s < 0.15


def test_a_task_waits_for_room_while_others_go_on_and_nothing_overtakes_it(world: Device) -> None:
    bench = Bench(max_resident=1)
    bench.offer(1, "a", steps=3)
    waits, behind = bench.offer(2, "b", steps=1), bench.offer(3, "a", steps=1)
    bench.engine.turn(0)
    assert waits.began is None
    assert bench.engine.await_room(0) == 0, "whatever came would stand behind it"
    bench.run()
    assert [seeds for _, seeds in world.steps] == [[1], [1], [1], [2], [3]]
    assert world.loads == ["a", "b", "a"]
    assert {task.outcome for task in bench.retired} == {"succeeded"}
    assert (waits.load_s > 0, behind.load_s > 0) == (True, True)
    assert bench.engine.await_room(0) == 4


def test_a_worker_that_has_to_load_asks_for_no_more(world: Device) -> None:
    bench = Bench()
    bench.residency.prewarm()
    bench.offer(1, "a")
    assert bench.engine.await_room(0) == 3
    bench.offer(2, "b")
    assert bench.engine.await_room(0) == 0
    bench.run()
    assert bench.engine.await_room(0) == 4


def test_a_waiting_task_that_is_cancelled_holds_nobody_up(world: Device) -> None:
    bench = Bench(max_resident=1)
    running, waits = bench.offer(1, "a", steps=9), bench.offer(2, "b")
    bench.engine.turn(0)
    waits.verdict = "cancel"
    bench.engine.turn(0)
    bench.engine.turn(0)
    assert (waits.outcome, running.outcome) == ("canceled", None)
    assert bench.engine.await_room(0) == 3


def test_a_model_that_fails_to_load_gives_its_tasks_back_and_others_go_on(world: Device) -> None:
    world.broken["b"] = RuntimeError("half a file")
    bench = Bench()
    good, bad, too = bench.offer(1, "a"), bench.offer(2, "b", n=2), bench.offer(3, "b")
    bench.run()
    assert [task.outcome for task in (good, bad, too)] == ["succeeded", "released", "released"]
    assert (bad.began, world.loads.count("b")) == (None, 1)
    assert bench.residency.offered == ("a", "c")
    assert bench.engine.idle


def test_runs_share_a_step_only_with_their_like_and_groups_take_turns(world: Device) -> None:
    bench = Bench(limit=6)
    for seed, model, prompt in ((1, "a", "x"), (2, "a", "y"), (3, "b", "x"), (4, "a", "x"), (5, "a", "y")):
        bench.offer(seed, model, prompt=prompt, steps=4)
    bench.run()
    groups = [("a", [1, 4]), ("a", [2, 5]), ("b", [3])]
    assert world.steps == groups * 4


def test_a_newcomer_waits_one_round_and_no_more(world: Device) -> None:
    bench = Bench(limit=9)
    for seed in (1, 2, 3):
        bench.offer(seed, "a", prompt=f"group {seed}", steps=50)
    bench.engine.turn(0)
    for seed in (4, 5):
        bench.offer(seed, "a", prompt=f"group {seed}", steps=50)
    for _ in range(40):
        bench.engine.turn(0)
    assert [seeds for _, seeds in world.steps[:6]] == [[1], [2], [3], [1], [4], [5]]
    counts = [sum(seeds == [seed] for _, seeds in world.steps) for seed in range(1, 6)]
    assert max(counts) - min(counts) <= 1


def test_a_picture_begins_once_there_is_memory_and_in_order(world: Device) -> None:
    world.peak_mb = 100
    bench = Bench(memory_mb=450)
    small, large, late = (bench.offer(seed, "a", width=64 * width, steps=2) for seed, width in ((1, 1), (2, 3), (3, 1)))
    bench.engine.turn(0)
    assert (large.began, late.began, bench.engine.await_room(0)) == (None, None, 0)
    bench.run()
    assert [seeds for _, seeds in world.steps] == [[1], [1], [2], [2], [3], [3]]
    assert [task.outcome for task in (small, large, late)] == ["succeeded"] * 3


def test_a_picture_that_never_fits_fails_at_once_naming_the_limit(world: Device) -> None:
    world.peak_mb = 100
    bench = Bench(memory_mb=450)
    running, never, other = bench.offer(1, "a", steps=5), bench.offer(2, "a", width=512), bench.offer(3, "a", steps=5)
    bench.engine.turn(0)
    assert never.error is not None
    assert (never.outcome, never.error.code, never.error.retryable) == ("failed", "out_of_memory", True)
    assert "this worker's 450 MiB" in never.error.message
    assert world.steps == [("a", [1, 3])]
    bench.run()
    assert [running.outcome, other.outcome] == ["succeeded", "succeeded"]


def test_a_residue_is_looked_for_at_rest_and_beside_pictures_that_are_being_made(world: Device) -> None:
    world.peak_mb = 20
    bench = Bench()
    residues: list[float] = []
    for prompt in ("keep 10", "keep 50"):
        bench.offer(1, "a", prompt=prompt, steps=1), bench.offer(2, "a", steps=3)
        bench.engine.turn(0), bench.engine.turn(0)
        residues.append(bench.residency.counters()["memory_residues"])
        bench.run()
        residues.append(bench.residency.counters()["memory_residues"])
    assert residues == [0, 1, 2, 3], "10 MiB may be the other picture's, 50 cannot all be"


def test_after_a_leak_nothing_is_loaded_and_what_has_begun_is_finished(world: Device) -> None:
    world.leaks_mb["a"] = 50
    bench = Bench(max_resident=1, keep=())
    bench.offer(1, "a", steps=1)
    bench.run()
    waits = bench.offer(2, "b")
    bench.engine.turn(0)
    assert (bench.residency.leaked, waits.began, waits.outcome) == (True, None, None)
    bench.engine.release(begun=False)
    assert waits.outcome == "released"


@pytest.mark.parametrize("verdict", ["cancel", "lost"])
def test_nothing_is_loaded_for_a_task_that_was_stopped(world: Device, verdict: Verdict) -> None:
    bench = Bench()
    task = bench.offer(1, "a")
    task.verdict = verdict
    late = bench.offer(2, "b", deadline_s=1.0)
    late.deadline = time.monotonic()
    bench.engine.turn(0)
    assert world.loads == []
    assert (task.outcome, late.outcome) == ("canceled" if verdict == "cancel" else "lost", "failed")


def test_a_task_that_is_stopped_while_models_load_is_not_begun(world: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    tasks = [bench.offer(1, "a"), bench.offer(2, "b")]
    load = Made.load

    def stopped(pipeline: Made) -> None:
        load(pipeline)
        for task in tasks:
            task.verdict = "cancel"

    monkeypatch.setattr(Made, "load", stopped)
    bench.engine.turn(0)
    assert (world.loads, world.steps) == (["a"], [])
    assert [task.outcome for task in tasks] == ["canceled", "canceled"]
    assert [task.began and task.runs for task in tasks] == [[], None]


def test_a_picture_whose_memory_cannot_be_told_fails_alone(world: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(memory_mb=450)
    running = bench.offer(1, "a", steps=3)
    bench.engine.turn(0)
    with monkeypatch.context() as broken:
        broken.setattr(Made, "peak_bytes", lambda *_: 1 // 0)
        odd = bench.offer(2, "a")
        bench.engine.turn(0)
    assert odd.error is not None
    assert (odd.outcome, odd.error.code) == ("failed", "pipeline_failed")
    bench.run()
    assert running.outcome == "succeeded"


def test_a_device_that_fails_meanwhile_is_no_picture_that_does(world: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(memory_mb=450)
    task = bench.offer(1, "a")
    bench.residency.prewarm()

    def fail(*_: object) -> int:
        raise DeviceFailed("gone")

    monkeypatch.setattr(Made, "peak_bytes", fail)
    with pytest.raises(DeviceFailed):
        bench.engine.turn(0)
    assert task.outcome is None
