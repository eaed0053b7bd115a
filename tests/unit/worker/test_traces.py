"""What a worker and its supervisor tell of attempts, to a real collector."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator

import pytest

from common import tracing
from common.broker import Broker
from common.errors import StorageFull
from common.records import NewTask
from common.settings import Settings
from common.storage import open_storage
from tests.collector import Collector, Told
from tests.conftest import resolved
from tests.unit.worker.test_commit import Filling
from tests.unit.worker.test_engine import Bench
from worker import commit as committing
from worker import traces
from worker.commit import Committer
from worker.held import HeldTask
from worker.reaper import Burial, Reaper

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[Told]]]:
    """Trace what the test does; returns its spans once all are made."""
    with Collector() as collector:
        for name, value in collector.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(tracing, "_spans", None)
        tracing.configure("worker", "w1")

        def close() -> list[Told]:
            tracing.close()
            return collector.trace(TRACE)

        yield close


@pytest.fixture
def submit(broker: Broker) -> Callable[..., str]:
    def traced(**changes: object) -> str:
        parent = f"00-{TRACE}-{PARENT}-01"
        task = NewTask(
            task_id=secrets.token_hex(16),
            tenant="default",
            request=resolved(**changes),
            request_id="r1",
            traceparent=parent,
        )
        return broker.submit(task).task_id

    return traced


def claim(broker: Broker) -> HeldTask:
    (claimed,) = broker.claim("w1", "cpu", ["simulated"], 9).tasks
    return HeldTask(claimed=claimed, deadline=None, trace=traces.begin(claimed))


def run(broker: Broker, settings: Settings, store: object = None, **beside: object) -> HeldTask:
    """Carry out the task in line, with another that is not traced if `beside` has something of its request."""
    task, bench = claim(broker), Bench()
    bench.engine.offer(task)
    if beside:
        bench.offer(1, **beside)
    bench.run()
    committer = Committer("w1", broker, store or open_storage(settings), committed=lambda _: None)  # type: ignore[arg-type]
    committer.commit(task)
    committer.close()
    return task


def names(spans: list[Told], parent: str = PARENT) -> list[str]:
    return [span.name for span in spans if span.parent_id == parent]


def test_each_picture_has_its_stages(
    broker: Broker, settings: Settings, submit: Callable[..., str], told: Callable[[], list[Told]]
) -> None:
    submit(n=2)
    time.sleep(0.05)
    run(broker, settings)
    spans = told()
    assert names(spans) == ["queued", "attempt"]
    queued, attempt = (span for span in spans if span.parent_id == PARENT)
    assert queued.ended_ns - queued.began_ns > 45e6 and queued.ended_ns == attempt.began_ns
    assert (attempt.attributes["zfleet.images"], attempt.failed) == (2, False)
    stages = [span for span in spans if span.parent_id == attempt.span_id]
    by_picture = sorted((span.attributes.get("zfleet.picture", -1), span.name) for span in stages)
    assert by_picture == [(-1, "finish"), (-1, "store")] + [
        (picture, stage) for picture in (0, 1) for stage in ("decode", "denoise", "encode")
    ]


def steps(spans: list[Told]) -> list[tuple[int, int]]:
    """Return which steps there are, and how many pictures each advanced."""
    return [(span.attributes["zfleet.step"], span.attributes["zfleet.batch"]) for span in spans if span.name == "step"]


def test_each_step_has_its_time_within_its_pictures_denoising(
    broker: Broker, settings: Settings, submit: Callable[..., str], told: Callable[[], list[Told]]
) -> None:
    submit(steps=3)
    run(broker, settings, steps=2)
    spans = told()
    (denoise,) = [span for span in spans if span.name == "denoise"]
    made = [span for span in spans if span.name == "step"]
    assert steps(spans) == [(1, 2), (2, 2), (3, 1)]
    assert {span.parent_id for span in made} == {denoise.span_id}
    assert {(span.attributes["zfleet.picture"], span.attributes["zfleet.steps"]) for span in made} == {(0, 3)}
    moments = [moment for span in made for moment in (span.began_ns, span.ended_ns)]
    assert moments == sorted(moments) and denoise.began_ns <= moments[0] and moments[-1] <= denoise.ended_ns


@pytest.mark.parametrize(
    ("prompt", "beside", "again"),
    [("a fox", {"prompt": "break step"}, False), ("crowded finish", {"steps": 9}, True)],
    ids=["a neighbour's error", "no memory in a crowd"],
)
def test_a_step_that_failed_is_none_and_a_picture_begun_anew_has_its_last_steps(
    prompt: str, beside: dict[str, object], again: bool,
    broker: Broker, settings: Settings, submit: Callable[..., str], told: Callable[[], list[Told]],
) -> None:  # fmt: skip
    submit(steps=3, prompt=prompt)
    task = run(broker, settings, **beside)
    assert (task.alone, task.outcome) == (again, "succeeded")
    assert steps(told()) == [(1, 1), (2, 1), (3, 1)]


def test_what_fails_says_by_which_code(
    broker: Broker, settings: Settings, submit: Callable[..., str], told: Callable[[], list[Told]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(committing, "STORE_WAIT_S", 0.001)
    submit()
    run(broker, settings, Filling(settings, room=0))
    (attempt,) = [span for span in told() if span.name == "attempt"]
    assert attempt.failed
    assert (attempt.attributes["error.type"], attempt.attributes["zfleet.outcome"]) == (StorageFull.code, "failed")


def test_an_attempt_that_is_given_back_and_the_next_wait_are_told_apart(
    broker: Broker, settings: Settings, submit: Callable[..., str], told: Callable[[], list[Told]]
) -> None:
    submit()
    task = claim(broker)
    task.outcome = "released"
    committer = Committer("w1", broker, open_storage(settings), committed=lambda _: None)
    committer.commit(task)
    committer.close()
    time.sleep(0.1)
    run(broker, settings)
    spans = told()
    assert names(spans) == ["queued", "attempt", "queued", "attempt"]
    first, released, again, _ = (span for span in spans if span.parent_id == PARENT)
    assert (released.attributes["zfleet.outcome"], released.failed) == ("released", False)
    assert (
        again.began_ns >= released.began_ns
        and again.ended_ns - again.began_ns < 5e9
        and first.began_ns < again.began_ns
    )


def test_the_supervisor_tells_of_what_a_dead_worker_held_and_of_what_expired(
    broker: Broker, settings: Settings, submit: Callable[..., str], told: Callable[[], list[Told]]
) -> None:
    submit()
    task = claim(broker)
    reaper = Reaper(broker, open_storage(settings))
    reaper.bury(Burial("w1", suspects=[task.in_hand]))
    broker.cancel(task.claimed.task_id, None)
    submit(deadline_s=0.01)
    time.sleep(0.05)
    reaper._next_reap = 0.0
    reaper.tick()
    spans = told()
    assert names(spans) == ["queued", "attempt", "queued"]
    _, attempt, expired = spans
    assert (attempt.failed, attempt.attributes["error.type"]) == (True, "crashed")
    assert attempt.attributes["zfleet.request_id"] == "r1"
    assert (expired.failed, expired.attributes["zfleet.outcome"]) == (True, "expired")


def test_a_task_whose_limit_its_worker_was_killed_for_is_told_too(
    broker: Broker, settings: Settings, submit: Callable[..., str], told: Callable[[], list[Told]]
) -> None:
    submit()
    Reaper(broker, open_storage(settings)).bury(Burial("w1", tripped=[claim(broker).in_hand]))
    (attempt,) = [span for span in told() if span.name == "attempt"]
    assert (attempt.failed, attempt.attributes["zfleet.outcome"]) == (True, "failed")


def test_an_untraced_task_is_not_asked_about(
    broker: Broker, settings: Settings, told: Callable[[], list[Told]]
) -> None:
    broker.submit(NewTask(task_id="plain", tenant="default", request=resolved()))
    assert broker.traced("plain", 1) is None and broker.traced("nobody") is None
    assert claim(broker).trace is None
    assert told() == []
