"""When a worker has to be killed; that it is, tests/faults shows."""

from __future__ import annotations

import math
import time

import pytest

from common.settings import Settings, load_settings
from worker.heartbeat import InHand, Reading, Stage
from worker.watchdog import Stall, stall


@pytest.fixture
def limits() -> Settings:
    return load_settings({"step_limit_s": 30.0, "load_limit_s": 600.0})


def reading(stage: Stage, standing_s: float, *on_device: InHand) -> Reading:
    return Reading(
        stage=stage, since=time.monotonic() - standing_s, device_mb=0, done=0, on_device=on_device, in_store=()
    )


@pytest.mark.parametrize(
    ("stage", "standing_s", "cause"),
    [
        (Stage.IDLE, 1e6, None),
        (Stage.BUSY, 29, None),
        (Stage.BUSY, 31, "step_limit"),
        (Stage.LOADING, 31, None),
        (Stage.LOADING, 601, "load_limit"),
        (Stage.STARTING, 601, "load_limit"),
    ],
)
def test_each_stage_has_a_budget_of_its_own(limits: Settings, stage: Stage, standing_s: float, cause: str) -> None:
    assert stall(reading(stage, standing_s), limits) == (Stall(cause) if cause else None)


def test_a_limit_passed_within_one_step_trips_for_the_tasks_concerned(limits: Settings) -> None:
    now = time.monotonic()
    late = InHand("late", 1, now - 3, "run_limit")
    other = InHand("other", 1, math.inf, "run_limit")
    assert stall(reading(Stage.BUSY, 5, late, other), limits) == Stall("fuse", [late])


def test_a_storage_that_hangs_ends_the_worker_and_blames_nobody(limits: Settings) -> None:
    now = time.monotonic()
    for since, found in ((now - 29, None), (now - 31, Stall("store_limit", blame=False))):
        idle = Reading(stage=Stage.IDLE, since=now, device_mb=0, done=0, on_device=(), in_store=(), store_since=since)
        assert stall(idle, limits) == found


def test_a_worker_that_still_steps_stops_its_runs_itself(limits: Settings) -> None:
    late = InHand("late", 1, time.monotonic() - 3, "deadline")
    assert stall(reading(Stage.BUSY, 0.5, late), limits) is None
    just = InHand("just", 1, time.monotonic() - 1, "deadline")
    assert stall(reading(Stage.BUSY, 5, just), limits) is None
