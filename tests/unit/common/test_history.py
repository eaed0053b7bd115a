"""Differences, gaps, resets and quantiles, without a Redis."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import history
from common.fleet import Recent
from common.histograms import BATCH_SIZES, CALL_SECONDS, SECONDS, STAGE_SECONDS, Bounds
from common.history import DURATIONS, OUTCOMES, STEPS, Point, Sample, difference

STEP_S = 10
COUNTERS = ("submitted", "images", "tasks|succeeded", "tasks|failed", "tasks|canceled", "tasks|expired", "took|0.5")
GROWTH = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(COUNTERS, st.integers(0, 50))), max_size=20)


def sample(at_s: float, counts: dict[str, int], **changes: object) -> Sample:
    fields = {"at": round(at_s * 1000), "counts": counts, "queued": 0, "running": 0, "workers": 1}
    return Sample.model_validate(fields | changes)


def grown(steps: list[dict[str, int]], every_s: float = STEP_S) -> list[Sample]:
    """Samples of counters that grew by so much in each step."""
    totals = accumulate(steps, lambda total, step: dict(Counter(total) + Counter(step)), initial={})
    return [sample(1_000_000 + nth * every_s, dict(total)) for nth, total in enumerate(totals)]


def points(samples: list[Sample], later_s: float = 0.0) -> list[Point]:
    """The steps as they are told so many seconds after the newest sample."""
    return history.points(samples, STEP_S, samples[-1].at + round(later_s * 1000))


def recent(samples: list[Sample], later_s: float = 0.0) -> Recent:
    return history.recent(samples, 900, STEP_S, (samples[-1].at if samples else 0) + round(later_s * 1000))


@given(GROWTH)
def test_a_step_has_what_was_counted_in_it(steps: list[dict[str, int]]) -> None:
    found = points(grown(steps))
    assert len(found) == len(steps)
    for point, step in zip(found, steps, strict=True):
        assert (point.submitted, point.images) == (step.get("submitted", 0), step.get("images", 0))
        succeeded, failed, canceled, expired = (step.get(f"tasks|{outcome}", 0) for outcome in OUTCOMES)
        assert (point.succeeded, point.failed, point.canceled, point.expired) == (succeeded, failed, canceled, expired)
        lost = failed + expired
        ratio = lost / (succeeded + lost) if succeeded + lost else None
        assert point.error_ratio == (None if ratio is None else pytest.approx(ratio, abs=1e-4))
        assert (point.p50_seconds is not None) == bool(step.get("took|0.5"))


@given(GROWTH, st.integers(0, 20))
def test_counters_that_were_lost_begin_anew_and_nothing_is_below_zero(steps: list[dict[str, int]], lost: int) -> None:
    before, after = grown(steps[:lost]), grown(steps[lost:])
    later = [each.model_copy(update={"at": each.at + (len(before) * STEP_S) * 1000}) for each in after]
    for point in points([*before, *later]):
        assert min(point.submitted or 0, point.succeeded or 0, point.images or 0) >= 0
    assert sum(point.images or 0 for point in points(later)) == sum(s.get("images", 0) for s in steps[lost:])


def test_what_grew_since_the_loss_is_counted_whole() -> None:
    assert difference({"a": 9, "b": 1}, {"a": 3, "b": 2}) == {"a": 3, "b": 2}
    assert difference({"a": 9, "b": 1}, {"b": 5}) == {"b": 5}, "one that is gone is lost as well"


def test_crashes_that_an_earlier_version_did_not_sample_are_not_of_now() -> None:
    found = points([sample(100, {"images": 1}), sample(110, {"images": 2, "crashes": 7}), sample(120, {"crashes": 9})])
    assert [(point.images, point.crashes) for point in found[:1]] == [(1, 0)]
    assert Recent().crashes is None and difference({"crashes": 7}, {"crashes": 9}) == {"crashes": 2}


@given(st.integers(1, 50))
def test_steps_that_nobody_sampled_are_nulls(missing: int) -> None:
    first, second = sample(100_000, {"images": 1}), sample(100_000 + (missing + 1) * STEP_S, {"images": 9}, queued=4)
    found = points([first, second])
    assert len(found) == missing + 1
    assert {(point.images, point.queued) for point in found[:-1]} == {(None, None)}
    assert (found[-1].images, found[-1].queued) == (None, 4), "how much of it was in this step nobody knows"
    stamps = [point.at.timestamp() for point in found]
    assert stamps == [pytest.approx(100_000 + nth * STEP_S) for nth in range(1, missing + 2)]


@given(GROWTH, st.integers(1, 80))
def test_what_nobody_has_sampled_since_is_nulls_and_nothing_is_known_of_late(
    steps: list[dict[str, int]], missing: int
) -> None:
    samples = grown(steps)
    found = points(samples, missing * STEP_S + 7)
    whole = len(steps) + missing
    assert len(found) == min(whole, STEPS)
    assert {(point.images, point.workers) for point in found[-missing:]} == {(None, None)}
    assert found[-1].at.timestamp() == pytest.approx(samples[-1].at / 1000 + missing * STEP_S)
    assert missing == 1 or recent(samples, missing * STEP_S + 7) == Recent()


@pytest.mark.parametrize("away_s", [86_400, 365 * 86_400])
def test_after_a_long_time_without_samples_there_are_no_more_points_than_ever(away_s: int) -> None:
    first, last = sample(1_000, {"images": 1}), sample(1_000 + away_s, {"images": 2})
    assert len(points([first, last])) == STEPS and points([first, last])[-1].workers == 1
    assert len(points([first], away_s)) == STEPS


@given(GROWTH, st.floats(-3.0, 3.0))
def test_samples_that_come_a_little_late_or_early_are_no_gap(steps: list[dict[str, int]], late_s: float) -> None:
    samples = grown(steps)
    moved = [each.model_copy(update={"at": each.at + round(1000 * late_s * (n % 2))}) for n, each in enumerate(samples)]
    assert len(points(moved)) == len(steps)


def test_recent_is_what_was_done_back_to_a_gap_and_no_further_than_its_window() -> None:
    steps = [{"tasks|succeeded": 6, "images": 12, "took|0.5": 6}] * 120
    whole = recent(grown(steps))
    assert (whole.window_seconds, whole.tasks_per_minute, whole.images_per_minute) == (900, 36.0, 72.0)
    assert whole.p50_seconds == pytest.approx(0.4) and whole.error_ratio == 0
    samples = grown(steps)
    later = [each.model_copy(update={"at": each.at + 3_600_000}) for each in samples[60:]]
    assert recent([*samples[:60], *later]).window_seconds == 600
    for few in ([], samples[:1]):
        nothing = recent(few)
        assert (nothing.tasks_per_minute, nothing.p95_seconds) == (None, None)


@given(st.lists(st.floats(0.0, 5000.0), min_size=1), st.floats(0.0, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_exact_one(values: list[float], q: float) -> None:
    counts = Counter(DURATIONS.of(value) for value in values)
    found = DURATIONS.quantile(q, counts)
    rank = max(1, -(-int(q * len(values) * 1e9) // 10**9))  # the smallest value with at least that share below it
    exact = sorted(values)[min(len(values), rank) - 1]
    edges = [0.0, *(float(bound) for bound in DURATIONS.names)]
    at = DURATIONS.names.index(DURATIONS.of(exact))
    assert found is not None
    neighbours = edges[max(0, at - 1)], edges[min(at + 2, len(edges) - 2)]
    assert neighbours[0] <= found <= max(neighbours[1], edges[-2])
    assert 0 <= found <= edges[-2], "nothing is told beyond the last finite bound"


@given(st.lists(st.floats(0.0, 5000.0), min_size=1))
def test_quantiles_are_in_order(values: list[float]) -> None:
    counts = Counter(DURATIONS.of(value) for value in values)
    found = [DURATIONS.quantile(q / 20, counts) or 0.0 for q in range(21)]
    assert found == sorted(found)


def test_a_quantile_is_interpolated_within_its_bucket() -> None:
    assert DURATIONS.quantile(0.5, {"0.5": 4}) == pytest.approx(0.4), "halfway from 0.3 to 0.5"
    assert DURATIONS.quantile(0.5, {"0.1": 1, "+Inf": 3}) == 1800
    assert DURATIONS.quantile(0.5, {}) is DURATIONS.quantile(0.5, {"sum": 7}) is None


@pytest.mark.parametrize("text", [SECONDS, STAGE_SECONDS, CALL_SECONDS, BATCH_SIZES], ids=lambda text: text[:8])
def test_bounds_are_in_order_and_have_no_end(text: str) -> None:
    values = [float(name) for name in text.split()]
    assert values == sorted(set(values)) and values[-1] == float("inf")
    bounds = Bounds(text)
    assert [bounds.of(value) for value in values] == list(bounds.names)
    assert bounds.of(0) == bounds.names[0]


def test_a_clock_that_was_set_back_leaves_no_time_that_goes_back() -> None:
    before = [sample(101 + 10 * nth, {"images": nth, "tasks|succeeded": nth}) for nth in range(5)]
    assert recent([*before, sample(60, {"images": 5})]) == Recent(), "nothing is known of the time before"
    samples = [
        *before,
        sample(120, {"images": 5, "tasks|succeeded": 5}),
        sample(130, {"images": 7, "tasks|succeeded": 7}),
    ]
    assert [(point.at.timestamp(), point.images) for point in points(samples)] == [(111, 1), (120, 4), (130, 2)]
    assert recent(samples).window_seconds == 29
