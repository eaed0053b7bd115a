"""Growth that is a leak, and growth that is not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from worker.drift import Drift, Growth, Sample, Stays


def watch(
    rss: Callable[[float], float], device: Callable[[float], float] = lambda _: 0.0, *, hours: float = 1
) -> Growth | None:
    """Feed an hour of samples, as often as they are due; return what was found."""
    drift = Drift(limit_mb=200, window_s=300, warmup_s=300)
    age_s = 0.0
    while age_s < hours * 3600:
        age_s += 1.0
        if drift.due(age_s) and (grown := drift.grown(age_s, Sample(rss(age_s), device(age_s)))):
            return grown
    return None


def test_memory_that_varies_but_does_not_grow_is_left_alone() -> None:
    noise = random.Random(1)
    assert watch(lambda _: 2000 + noise.uniform(0, 300), lambda _: 20_000 + noise.uniform(0, 300)) is None


def test_growth_during_the_warm_up_does_not_count() -> None:
    assert watch(lambda age_s: min(age_s, 290) * 10) is None


def test_a_fast_leak_is_found_within_its_window() -> None:
    grown = watch(lambda age_s: 1000 + age_s)  # 300 MB in five minutes
    assert grown is not None
    assert grown.what == "rss"
    assert 200 < grown.mb < 320


def test_a_leak_of_device_memory_is_found() -> None:
    grown = watch(lambda _: 1000, lambda age_s: 20_000 + age_s)
    assert grown is not None
    assert grown.what == "device"


def test_a_slow_leak_is_found_in_the_end() -> None:
    def leak(age_s: float) -> float:
        return 1000 + age_s / 10  # 30 MB in five minutes: never 200 at a time

    assert watch(leak, hours=2) is None
    grown = watch(leak, hours=4)
    assert grown is not None
    assert grown.mb > 1000


def test_a_single_step_up_that_stays_small_is_no_drift() -> None:
    assert watch(lambda age_s: 1000 if age_s < 1000 else 1150) is None


def test_with_other_models_the_worker_warms_up_again() -> None:
    drift = Drift(limit_mb=200, window_s=300, warmup_s=300)
    assert not drift.due(299)
    assert drift.grown(300, Sample(1000, 0)) is None
    drift.restart(400, 1)
    assert drift.due(400)
    for age_s in range(400, 1200):
        assert drift.grown(age_s, Sample(1000 if age_s < 700 else 9000, 0)) is None


def swap(memory: Callable[[int], float], models: Sequence[int], *, swaps: int, stay_s: int = 600) -> int | None:
    """Swap models in turn, with memory by the number of swaps so far; return at which one a leak was found."""
    drift = Drift(limit_mb=200, window_s=300, warmup_s=300)
    for nth in range(swaps):
        drift.restart(nth * stay_s, models[nth % len(models)])
        for age_s in range(nth * stay_s, (nth + 1) * stay_s):
            if drift.due(age_s) and drift.grown(age_s, Sample(memory(nth), 0)):
                return nth
    return None


@pytest.mark.parametrize("stay_s", [20, 600, 3600])
def test_what_every_swap_leaves_behind_is_found_within_a_few_of_them(stay_s: int) -> None:
    def leak(nth: int) -> float:
        return (2000, 7000)[nth % 2] + 100 * nth

    warm_after = 300 // stay_s
    found = swap(leak, (1, 2), swaps=40, stay_s=stay_s)
    assert found is not None
    assert found <= warm_after + 8


def test_a_little_that_every_swap_leaves_behind_is_found_in_the_end() -> None:
    found = swap(lambda nth: 2000 + 10 * nth, (1, 2), swaps=150)
    assert found is not None
    assert 100 <= found <= 110


def test_swaps_that_leave_nothing_behind_are_no_drift() -> None:
    noise = random.Random(1)
    sizes = {models: 1000 + 3000 * models for models in range(5)}

    def honest(nth: int) -> float:
        once = 300 * (nth > 4) + 400 * (nth > 100)  # libraries that are needed at last
        return sizes[nth % 5] + once + noise.uniform(0, 150)

    assert swap(honest, range(5), swaps=1000, stay_s=100) is None
    assert swap(honest, range(5), swaps=300) is None


def test_ever_other_models_are_no_drift_and_take_no_room() -> None:
    stays = Stays(200)
    for models in range(1000):
        assert stays.end(models, Sample(1000 * models, 0)) is None
    assert len(stays._first) == len(stays._last) == 64
    assert 999 in stays._first
