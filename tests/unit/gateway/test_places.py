from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from common.schemas import Attempt, Outcome, Progress, TaskRecord, TaskStatus
from gateway.places import Place, mark, news
from tests.conftest import resolved

BEGAN = datetime(2026, 1, 31, tzinfo=UTC)
QUEUED, RUNNING, FAILED = TaskStatus.QUEUED, TaskStatus.RUNNING, TaskStatus.FAILED


def task(
    status: str, *outcomes: Outcome, step: int = 0, preview: str | None = None, flagged: bool = False
) -> TaskRecord:
    attempts = [
        Attempt(
            worker=f"w{number}", gpu="", started_at=BEGAN + timedelta(seconds=number), outcome=outcome,
            ended_at=None if outcome == "running" else BEGAN + timedelta(seconds=number, milliseconds=500),
        )
        for number, outcome in enumerate(outcomes)
    ]  # fmt: skip
    return TaskRecord(
        task_id="t", tenant="default", status=TaskStatus(status), request=resolved(preview=preview is not None),
        step=step, preview=preview, attempts=attempts, cancel_requested=flagged, created_at=BEGAN,
        position=3, eta_seconds=1.0,
    )  # fmt: skip


def told(record: TaskRecord, place: str | None) -> list[str]:
    """What somebody who was told of a place is told of next, each as its place; steps alone as their number."""
    return [
        str(Place.of(one)) if isinstance(one, TaskRecord) else str(one.step) for one in news(record, Place.parse(place))
    ]


@pytest.mark.parametrize(
    "place",
    [Place(0, QUEUED, 0), Place(3, RUNNING, 28), Place(999_999, FAILED, 0), Place(1, RUNNING, 2, mark("b2xk"))],
    ids=str,
)
def test_a_place_comes_back_as_it_was_written(place: Place) -> None:
    assert Place.parse(str(place)) == place
    assert "\n" not in str(place) and "\0" not in str(place)


@pytest.mark.parametrize(
    "text",
    [None, "", "ended", "1", "1.running", "1.running.", "x.running.1", "1.asleep.1", "-1.running.1", "1.running.1.x",
     "1.running.1.0123456", "1.running.1\n", "1.running.1234567", "٣.running.1", "1.running.1.00000000.1", "1" * 5000],
    ids=lambda text: str(text)[:24].encode("unicode_escape").decode(),
)  # fmt: skip
def test_any_other_text_is_no_place(text: str | None) -> None:
    assert Place.parse(text) is None


def test_whoever_was_told_nothing_is_told_the_task_as_it_is() -> None:
    assert told(task("running", "released", "running", step=3), None) == ["2.running.3"]


def test_what_is_known_is_not_told_again() -> None:
    assert told(task("queued"), "0.queued.0") == []
    assert told(task("running", "running", step=3), "1.running.3") == []
    assert told(task("succeeded", "succeeded", step=4), "1.succeeded.4") == []


def test_steps_go_forward_only() -> None:
    assert told(task("running", "running", step=5), "1.running.3") == ["5"]
    assert told(task("running", "running", step=2), "1.running.3") == []


def test_a_new_preview_is_told_and_a_known_one_is_not() -> None:
    seen = task("running", "running", step=3, preview="b2xk")
    assert list(news(seen, Place(1, RUNNING, 3))) == [Progress(step=3, steps=4, preview="b2xk")]
    assert list(news(seen, Place(1, RUNNING, 3, mark("b2xk")))) == []
    assert list(news(seen, Place(1, RUNNING, 2, mark("b2xk")))) == [Progress(step=3, steps=4)]


@pytest.mark.parametrize(
    ("record", "place", "expected"),
    [
        (task("running", "running", step=2), "0.queued.0", ["1.running.2"]),
        (task("succeeded", "succeeded", step=4), "0.queued.0", ["1.running.0", "1.succeeded.4"]),
        (task("queued", "released"), "1.running.3", ["1.queued.0"]),
        (task("queued", "released", "crashed"), "1.running.3", ["1.queued.0", "2.running.0", "2.queued.0"]),
        (task("failed", "lost", "failed"), "1.queued.0", ["2.running.0", "2.failed.0"]),
        (task("failed", "crashed", "crashed", "crashed"), "3.running.1", ["3.failed.0"]),  # quarantined at once
        (task("canceled"), "0.queued.0", ["0.canceled.0"]),
        (task("canceled", "released"), "1.running.1", ["1.queued.0", "1.canceled.0"]),
        (task("canceled", "crashed", flagged=True), "1.running.1", ["1.canceled.0"]),
        (task("canceled", "canceled", flagged=True), "1.running.1", ["1.canceled.0"]),
        (task("expired"), "0.queued.0", ["0.expired.0"]),
        (task("expired", "lost"), "1.running.1", ["1.queued.0", "1.expired.0"]),
    ],
    ids=lambda value: f"{Place.of(value)}-{len(value.attempts)}" if isinstance(value, TaskRecord) else str(value),
)
def test_every_change_that_was_missed_is_told_in_order(record: TaskRecord, place: str, expected: Sequence[str]) -> None:
    assert told(record, place) == expected


@pytest.mark.parametrize("place", ["7.running.1", "1.queued.0", "0.running.0", "2.succeeded.4"])
def test_a_place_where_this_task_never_was_counts_as_none(place: str) -> None:
    assert told(task("running", "running", step=2), place) == ["1.running.2"]


def test_a_task_that_redis_has_forgotten_a_part_of_is_told_as_it_now_is() -> None:
    assert told(task("queued"), "1.running.3") == ["0.queued.0"]


def test_what_passed_is_told_as_it_then_was() -> None:
    queued, running, last = news(task("succeeded", "lost", "succeeded", step=4), Place(1, RUNNING, 2))
    assert isinstance(queued, TaskRecord) and isinstance(running, TaskRecord) and isinstance(last, TaskRecord)
    assert [each.outcome for each in queued.attempts] == ["lost"]
    assert [each.outcome for each in running.attempts] == ["lost", "running"]
    assert (running.attempts[1].ended_at, running.finished_at, running.images) == (None, None, ())
    assert running.started_at == running.attempts[1].started_at
    assert (queued.position, queued.eta_seconds) == (None, None), "nobody knows any more"
    assert [each.outcome for each in last.attempts] == ["lost", "succeeded"]
