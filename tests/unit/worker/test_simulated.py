"""The simulated GPU keeps time: exactly by a clock of its own, and to 3% by the real one."""

from __future__ import annotations

import time

import numpy as np
import pytest

from common.models import BUILT_IN
from worker.pipelines import simulated
from worker.pipelines.base import ImageRequest, Run
from worker.pipelines.simulated import CATCH_UP_S, IN_TIME_S, Pipeline

SPEC = next(spec for spec in BUILT_IN if spec.name == "simulated")


class Clock:
    """Stands in for the time module: it moves when told to, and its sleeps overshoot."""

    def __init__(self, overshoot_s: float = 0.0) -> None:
        self.now = 1000.0
        self.overshoot_s = overshoot_s

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.overshoot_s


def make(image_ms: float = 80.0, load_ms: float = 0.0) -> Pipeline:
    spec = SPEC.model_copy(update={"options": {"image_ms": image_ms, "load_ms": load_ms}})
    return Pipeline(spec, device="cpu")


def start(pipeline: Pipeline, *, steps: int = 8, seed: int = 1, width: int = 64, height: int = 64) -> Run:
    return pipeline.start(
        ImageRequest(prompt="a cat", width=width, height=height, steps=steps, guidance_scale=0.0, seed=seed)
    )


def finish(pipeline: Pipeline, run: Run) -> None:
    while not run.done:
        pipeline.step([run])
    pipeline.finish(run)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(simulated, "time", clock)
    return clock


def test_a_picture_takes_image_ms_whatever_its_steps(clock: Clock) -> None:
    pipeline = make(image_ms=80)
    for steps in (1, 3, 8):
        began = clock.now
        finish(pipeline, start(pipeline, steps=steps))
        assert clock.now - began == pytest.approx(0.080)


def test_a_batch_steps_at_the_pace_of_its_longest_step(clock: Clock) -> None:
    pipeline = make(image_ms=80)
    quick, slow = start(pipeline, steps=8), start(pipeline, steps=2)
    began = clock.now
    pipeline.step([quick, slow])
    assert clock.now - began == pytest.approx(0.040)
    assert (quick.step, slow.step) == (1, 1)


def test_late_timers_do_not_add_up(clock: Clock) -> None:
    clock.overshoot_s = 0.003
    pipeline = make(image_ms=80)
    began = clock.now
    for _ in range(20):
        finish(pipeline, start(pipeline))
        clock.now += IN_TIME_S / 2  # the caller's own time, which a GPU would spend on work already queued
    assert clock.now - began == pytest.approx(20 * 0.080 + clock.overshoot_s + IN_TIME_S / 2)


def test_idle_time_is_not_made_up_for(clock: Clock) -> None:
    pipeline = make(image_ms=80)
    finish(pipeline, start(pipeline))
    clock.now += 2 * IN_TIME_S
    began = clock.now
    finish(pipeline, start(pipeline))
    assert clock.now - began == pytest.approx(0.080)


def test_a_stopped_process_makes_up_for_little(clock: Clock) -> None:
    pipeline = make(image_ms=8000)
    run = start(pipeline)
    clock.overshoot_s = 60.0
    pipeline.step([run])
    clock.overshoot_s = 0.0
    began = clock.now
    pipeline.step([run])
    assert clock.now - began == pytest.approx(1.0 - CATCH_UP_S)


def test_loading_takes_load_ms(clock: Clock) -> None:
    began = clock.now
    make(load_ms=700).load()
    assert clock.now - began == pytest.approx(0.7)


def test_options_fall_back_to_their_defaults(clock: Clock) -> None:
    pipeline = Pipeline(SPEC.model_copy(update={"options": {}}), device="cpu")
    began = clock.now
    pipeline.load()
    finish(pipeline, start(pipeline))
    assert clock.now - began == pytest.approx(0.320)


@pytest.mark.alone
def test_twenty_pictures_back_to_back_take_their_time_by_the_real_clock() -> None:
    took = []
    for _ in range(3):  # a busy machine may take the processor away for longer than a GPU would forgive
        pipeline = make(image_ms=50)
        began = time.monotonic()
        for seed in range(20):
            finish(pipeline, start(pipeline, seed=seed))
        took.append(time.monotonic() - began)
        assert took[-1] > 0.97
        if took[-1] < 1.03:
            return
    pytest.fail(f"20 pictures of 50 ms took {took} s")


def test_the_picture_is_a_gradient_of_its_seed() -> None:
    pipeline = make()
    one, same, other = (pipeline.finish(start(pipeline, seed=seed, width=128, height=32)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (32, 128, 3)
    assert np.abs(one.astype(int) - other).mean() > 10
    assert np.abs(np.diff(one.astype(int), axis=1)).max() <= 3
