"""Previews while a task is made: only where asked for, at most two a second, and never at the task's cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import DeviceFailed
from common.models import Catalogue, ModelSpec
from common.records import Claimed
from tests.conftest import resolved
from worker import previewing
from worker.engine import Engine
from worker.held import HeldTask
from worker.pipelines import simulated
from worker.pipelines.base import Run
from worker.residency import Residency

STEPS = 6
SPEC = ModelSpec(name="simulated", source="builtin", pipeline="simulated", options={"image_ms": 6.0})


class Bench:
    """An engine over the simulated model, stepped by hand."""

    def __init__(self) -> None:
        self.retired: list[HeldTask] = []
        self.engine = Engine(
            models=Residency(Catalogue([SPEC]), device="cpu"), batch_limits={"simulated": 4}, retire=self.retired.append
        )

    def offer(self, *, preview: bool = True, n: int = 1) -> HeldTask:
        request = resolved(steps=STEPS, preview=preview, n=n)
        claimed = Claimed(
            task_id="t", fence=1, queue="q", request=request, request_id="", queued_ms=0, deadline_in_s=None
        )
        task = HeldTask(claimed=claimed, deadline=None)
        self.engine.offer(task)
        return task


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The moment by which previews are due, as its only entry."""
    now = [100.0]
    monkeypatch.setattr(previewing.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seed of each preview that was made."""
    seeds: list[int] = []
    draw = simulated.Pipeline.preview

    def noted(pipeline: simulated.Pipeline, run: Run) -> NDArray[np.uint8]:
        seeds.append(run.request.seed)
        return draw(pipeline, run)

    monkeypatch.setattr(simulated.Pipeline, "preview", noted)
    return seeds


def test_two_a_second_of_the_first_picture(clock: list[float], drawn: list[int]) -> None:
    bench = Bench()
    task = bench.offer(n=2)
    seed = task.claimed.request.seed
    bench.engine.turn(0)
    assert task.preview is not None and task.preview.shape == (8, 8, 3)
    bench.engine.turn(0)
    assert drawn == [seed], "it is too early for another"
    clock[0] += previewing.PREVIEW_EVERY_S
    bench.engine.turn(0)
    assert drawn == [seed, seed]


def test_none_that_nobody_asked_for_and_none_of_the_end(clock: list[float], drawn: list[int]) -> None:
    bench = Bench()
    task = bench.offer(preview=False)
    while bench.engine.turn(0):
        clock[0] += 1
    assert (drawn, task.outcome) == ([], "succeeded")
    task = bench.offer()
    while bench.engine.turn(0):
        clock[0] += 1
    assert len(drawn) == STEPS - 1, "after the last step there is the picture itself"


def test_one_that_cannot_be_made_is_the_last(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Run] = []

    def fail(_: simulated.Pipeline, run: Run) -> None:
        tried.append(run)
        raise RuntimeError("no")

    monkeypatch.setattr(simulated.Pipeline, "preview", fail)
    bench = Bench()
    task = bench.offer()
    while bench.engine.turn(0):
        clock[0] += 1
    assert (task.outcome, task.preview_due, len(tried)) == ("succeeded", math.inf, 1)


def test_a_device_that_fails_there_has_failed(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: simulated.Pipeline, _run: Run) -> None:
        raise DeviceFailed("gone")

    monkeypatch.setattr(simulated.Pipeline, "preview", fail)
    bench = Bench()
    bench.offer()
    with pytest.raises(DeviceFailed):
        bench.engine.turn(0)
