"""Who advances with whom, and what becomes of a run that is stopped, late or broken."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import CapturingLogger

from common.errors import DeviceFailed, OutOfMemory
from common.models import ModelSpec
from common.records import Claimed
from tests.conftest import resolved
from worker.engine import Engine
from worker.held import HeldTask
from worker.pipelines.base import BasePipeline, ImageRequest, Run

SPEC = ModelSpec(name="simulated", source="builtin", pipeline="simulated")


class Recorder(BasePipeline):
    """A pipeline that notes each batch and breaks on a prompt that says so."""

    def __init__(self) -> None:
        super().__init__(SPEC, device="cpu")
        self.batches: list[list[int]] = []
        self.alive: set[int] = set()

    def load(self) -> None: ...

    def start(self, request: ImageRequest) -> Run:
        if request.prompt == "break start":
            raise RuntimeError("secret prompt text")
        run = Run(request=request, warnings=["cut"] if request.prompt == "long" else [])
        self.alive.add(id(run))
        return run

    def step(self, runs: Sequence[Run]) -> None:
        self.batches.append([run.request.seed for run in runs])
        for run in runs:
            self._fit("step", run, runs)
        if any(run.request.prompt == "lose device" for run in runs):
            raise DeviceFailed("gone")
        if any(run.request.prompt == "break step" for run in runs):
            raise RuntimeError("out of memory")
        for run in runs:
            run.step += 1

    def _fit(self, where: str, run: Run, runs: Sequence[Run]) -> None:
        prompt = run.request.prompt
        if prompt == f"too large to {where}" or (prompt == f"crowded {where}" and max(len(runs), len(self.alive)) > 1):
            raise OutOfMemory("no memory left")

    def finish(self, run: Run) -> NDArray[np.uint8]:
        self._fit("finish", run, [run])
        if run.request.prompt == "break finish":
            raise RuntimeError
        return np.full((run.request.height, run.request.width, 3), run.request.seed, np.uint8)

    def discard(self, run: Run) -> None:
        self.alive.discard(id(run))


class Resident:
    """Has one pipeline for all models, always in memory."""

    def __init__(self, pipeline: BasePipeline, models: Collection[str]) -> None:
        self.loaded = models
        self._pipeline = pipeline

    def acquire(self, model: str) -> float | None:
        return 0.0

    def release(self, model: str) -> None: ...

    def pipeline(self, model: str) -> BasePipeline:
        return self._pipeline

    def fits(self, model: str, requests: Sequence[ImageRequest]) -> bool:
        return True

    def settle(self, model: str, made: Mapping[str, Sequence[ImageRequest]]) -> None: ...


class Bench:
    """An engine over a Recorder, with what it retired."""

    def __init__(self, limit: int = 4, *, run_limit_s: float | None = None, **limits: int) -> None:
        self.pipeline = Recorder()
        self.retired: list[HeldTask] = []
        self.stores = True  # at once
        self.engine = Engine(
            models=Resident(self.pipeline, {"simulated", *limits}),
            batch_limits={"simulated": limit, **limits},
            retire=self.retire,
            run_limits={"simulated": run_limit_s} if run_limit_s else None,
            fence_after_s=10.0,
        )

    def offer(self, seed: int, **changes: object) -> HeldTask:
        deadline_in_s = changes.pop("deadline_in_s", None)
        alone = bool(changes.pop("alone", False))
        claimed = Claimed(
            task_id=f"task{seed}", fence=1, queue="q", request=resolved(seed=seed, **changes), request_id="",
            queued_ms=0, deadline_in_s=None,
        )  # fmt: skip
        deadline = time.monotonic() + float(str(deadline_in_s)) if deadline_in_s is not None else None
        task = HeldTask(claimed=claimed, deadline=deadline, alone=alone)
        self.engine.offer(task)
        return task

    def retire(self, task: HeldTask) -> None:
        self.retired.append(task)
        task.stored = self.stores

    def run(self) -> None:
        while self.engine.turn(0):
            pass


def test_runs_of_any_age_size_and_length_advance_in_one_batch() -> None:
    bench = Bench()
    bench.offer(1, steps=3)
    bench.engine.turn(0)
    bench.offer(2, steps=2, width=128)
    bench.run()
    assert bench.pipeline.batches == [[1], [1, 2], [1, 2]]
    assert [task.claimed.task_id for task in bench.retired] == ["task1", "task2"]
    assert bench.retired[1].pixels[0].shape == (64, 128, 3)
    assert not bench.pipeline.alive


def test_it_counts_how_many_pictures_advanced_together() -> None:
    bench = Bench(limit=8)
    assert bench.engine.counts() == {}
    bench.offer(1, steps=3)
    bench.engine.turn(0)
    bench.offer(2, steps=2, n=4)
    bench.run()
    assert bench.engine.counts() == {
        "batch|simulated|1": 1, "batch|simulated|6": 2, "batch|simulated|sum": 1 + 2 * 5
    }, "by the first bound that holds it; the sum is how many steps it took"  # fmt: skip


def test_a_full_batch_lets_the_next_in_as_soon_as_one_leaves() -> None:
    bench = Bench(limit=2)
    for seed, steps in ((1, 1), (2, 3), (3, 1)):
        bench.offer(seed, steps=steps)
    bench.run()
    assert bench.pipeline.batches == [[1, 2], [2, 3], [2]]


def test_the_pictures_of_one_task_run_together_and_end_it_together() -> None:
    bench = Bench(limit=2)
    task = bench.offer(10, n=3, steps=2)
    bench.run()
    assert bench.pipeline.batches == [[10, 11], [10, 11], [12], [12]]
    assert bench.retired == [task]
    assert [int(task.pixels[k][0, 0, 0]) for k in range(3)] == [10, 11, 12]


def test_room_counts_runs_on_their_last_step_as_gone() -> None:
    bench = Bench(limit=2)
    assert bench.engine.await_room(0) == 2
    bench.offer(1, steps=2)
    assert bench.engine.await_room(0) == 1
    bench.offer(2, steps=3)
    rooms: list[int] = []
    step = bench.pipeline.step
    bench.pipeline.step = lambda runs: (rooms.append(bench.engine.await_room(0)), step(runs))[1]  # type: ignore[method-assign]
    bench.run()
    assert rooms == [0, 1, 2]


def test_a_waiting_feeder_hears_of_room() -> None:
    bench = Bench(limit=1)
    bench.offer(1, steps=2)
    heard: list[int] = []
    feeder = threading.Thread(target=lambda: heard.append(bench.engine.await_room(5)))
    feeder.start()
    bench.run()
    feeder.join(5)
    assert heard == [1]


@pytest.mark.parametrize("where", ["start", "step", "finish"])
def test_a_broken_run_fails_alone_and_its_error_quotes_nothing(where: str) -> None:
    bench = Bench()
    good, bad, other = bench.offer(1), bench.offer(2, prompt=f"break {where}"), bench.offer(3)
    bench.run()
    assert [task.outcome for task in (good, bad, other)] == ["succeeded", "failed", "succeeded"]
    assert bad.error is not None
    assert (bad.error.code, "secret" in bad.error.message) == ("pipeline_failed", False)
    assert len(bench.retired) == 3
    assert not bench.pipeline.alive


@pytest.mark.parametrize(("verdict", "outcome"), [("cancel", "canceled"), ("lost", "lost")])
def test_a_verdict_stops_a_run_at_the_next_step(verdict: str, outcome: str) -> None:
    bench = Bench()
    stopped, other = bench.offer(1, steps=9), bench.offer(2, steps=2)
    bench.engine.turn(0)
    stopped.verdict = verdict  # type: ignore[assignment]
    bench.run()
    assert (stopped.outcome, stopped.pixels, other.outcome) == (outcome, {}, "succeeded")
    assert bench.pipeline.batches == [[1, 2], [2]]
    assert not bench.pipeline.alive


def test_a_deadline_ends_a_run_at_the_step_boundary() -> None:
    bench = Bench()
    late = bench.offer(1, steps=9, deadline_in_s=0.02, deadline_s=5.0)
    bench.engine.turn(0)
    time.sleep(0.03)
    bench.run()
    assert late.error is not None
    assert (late.outcome, late.error.code) == ("failed", "deadline_exceeded")
    assert len(bench.pipeline.batches) == 1


def test_a_picture_past_its_models_limit_is_stopped_at_the_step_boundary(monkeypatch: pytest.MonkeyPatch) -> None:
    told = CapturingLogger()
    monkeypatch.setattr("worker.engine.log", told)
    bench = Bench(run_limit_s=0.02)
    late = bench.offer(1, steps=9)
    bench.engine.turn(0)
    time.sleep(0.03)
    quick = bench.offer(2, steps=1)
    bench.run()
    assert late.error is not None
    assert (late.outcome, late.error.code, quick.outcome) == ("failed", "deadline_exceeded", "succeeded")
    assert "simulated may take 0.02 s" in late.error.message
    assert bench.pipeline.batches == [[1], [2]]
    (call,) = told.calls
    assert (call.args, call.kwargs["task_id"], call.kwargs["cause"]) == (("fuse_tripped",), "task1", "run_limit")


def test_every_picture_of_a_task_has_the_whole_limit() -> None:
    bench = Bench(limit=1, run_limit_s=0.2)
    task = bench.offer(1, n=4, steps=2)
    step = bench.pipeline.step
    bench.pipeline.step = lambda runs: (time.sleep(0.04), step(runs))[1]  # type: ignore[method-assign]
    bench.run()
    assert task.outcome == "succeeded"


def test_a_suspect_runs_alone_and_the_others_after_it() -> None:
    bench = Bench()
    bench.offer(1, steps=2)
    bench.engine.turn(0)
    for seed, alone in ((2, True), (3, True), (4, False), (5, False)):
        bench.offer(seed, steps=2, alone=alone)
    assert bench.engine.await_room(0) == 0
    bench.run()
    assert bench.pipeline.batches == [[1], [1], [2], [2], [3], [3], [4, 5], [4, 5]]
    assert bench.engine.await_room(0) == 4


def test_a_suspect_is_alone_until_its_pictures_are_stored() -> None:
    bench = Bench()
    bench.stores = False
    suspect, other = bench.offer(1, steps=1, alone=True), bench.offer(2, steps=1)
    bench.run()
    assert (suspect.outcome, other.began) == ("succeeded", None)
    suspect.stored = True
    bench.run()
    assert other.outcome == "succeeded"


@pytest.mark.parametrize("where", ["step", "finish"])
def test_a_run_that_does_not_fit_beside_others_is_made_alone(where: str) -> None:
    bench = Bench()
    tasks = [bench.offer(1, steps=3), bench.offer(2, steps=2, prompt=f"crowded {where}"), bench.offer(3, steps=3)]
    bench.run()
    assert [task.outcome for task in tasks] == ["succeeded"] * 3
    assert bench.pipeline.batches[-2:] == [[2], [2]]
    assert not bench.pipeline.alive


@pytest.mark.parametrize("where", ["step", "finish"])
def test_a_run_that_does_not_fit_at_all_fails_and_the_next_succeeds(where: str) -> None:
    bench = Bench()
    large, other = bench.offer(1, prompt=f"too large to {where}", n=2), bench.offer(2)
    bench.run()
    assert large.error is not None
    assert (large.outcome, large.error.code, other.outcome) == ("failed", "out_of_memory", "succeeded")
    after = bench.offer(3)
    bench.run()
    assert after.outcome == "succeeded"
    assert not bench.pipeline.alive


def test_what_a_failed_batch_had_in_memory_is_gone_before_its_runs_go_on_alone() -> None:
    bench = Bench()
    tasks = [bench.offer(1), bench.offer(2)]
    activations: list[weakref.ref[np.ndarray]] = []
    alive: list[bool] = []
    step = bench.pipeline.step

    def forward(runs: Sequence[Run]) -> None:
        if len(runs) > 1:
            activation = np.zeros(10)
            activations.append(weakref.ref(activation))
            raise RuntimeError(activation.shape)
        alive.append(activations[-1]() is not None)
        step(runs)

    bench.pipeline.step = forward  # type: ignore[method-assign]
    bench.run()
    assert [task.outcome for task in tasks] == ["succeeded", "succeeded"]
    assert alive
    assert not any(alive)


def test_a_lease_not_renewed_for_long_ends_the_run() -> None:
    bench = Bench()
    cut_off, renewed = bench.offer(1, steps=9), bench.offer(2, steps=2)
    bench.engine.turn(0)
    cut_off.leased_at -= 11.0
    bench.run()
    assert (cut_off.outcome, renewed.outcome) == ("released", "succeeded")


def test_a_failed_device_leaves_the_suspects_to_the_supervisor() -> None:
    bench = Bench(limit=2)
    suspects = [bench.offer(1, steps=3, prompt="lose device"), bench.offer(2)]
    waiting = bench.offer(3)
    with pytest.raises(DeviceFailed):
        bench.run()
    bench.engine.abandon()
    assert [task.outcome for task in (*suspects, waiting)] == [None, None, "released"]
    assert bench.retired == [waiting]


def test_models_take_turns() -> None:
    bench = Bench(limit=2, pico=2)
    bench.offer(1, steps=2)
    bench.offer(2, steps=2, model="pico")
    bench.run()
    assert sorted(bench.pipeline.batches[:2]) == [[1], [2]]
    assert len(bench.pipeline.batches) == 4


def test_release_gives_back_what_has_not_begun_and_then_the_rest() -> None:
    bench = Bench(limit=1)
    running, waiting = bench.offer(1, steps=3), bench.offer(2)
    bench.engine.turn(0)
    bench.engine.release(begun=False)
    assert (running.outcome, waiting.outcome) == (None, "released")
    bench.engine.release(begun=True)
    assert running.outcome == "released"
    assert bench.engine.idle
    assert not bench.pipeline.alive


def test_progress_is_the_slowest_pictures() -> None:
    bench = Bench(limit=1)
    task = bench.offer(1, n=2, steps=2)
    bench.engine.turn(0)
    assert task.steps_done == 0
    bench.run()
    assert task.steps_done == 2


def test_warnings_are_told_once() -> None:
    bench = Bench()
    task = bench.offer(1, n=3, prompt="long")
    bench.run()
    assert task.warnings == ["cut"]


def test_an_idle_turn_waits_for_work_and_hurry_ends_the_waiting() -> None:
    bench = Bench()
    began = time.monotonic()
    assert not bench.engine.turn(0.1)
    assert time.monotonic() - began >= 0.1
    bench.engine.hurry()
    began = time.monotonic()
    assert not bench.engine.turn(5)
    assert time.monotonic() - began < 1
