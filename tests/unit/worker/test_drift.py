"""Growth that is a leak, and growth that is not."""

from __future__ import annotations

import random
from collections.abc import Callable

from worker.drift import Drift, Growth, Sample


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


def test_after_a_restart_the_worker_warms_up_again() -> None:
    drift = Drift(limit_mb=200, window_s=300, warmup_s=300)
    assert not drift.due(299)
    assert drift.grown(300, Sample(1000, 0)) is None
    drift.restart(400)
    assert (drift.due(699), drift.due(700)) == (False, True)
    for age_s in range(700, 1200):
        assert drift.grown(age_s, Sample(9000, 0)) is None
