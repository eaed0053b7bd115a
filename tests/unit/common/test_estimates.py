"""When a task will be done, by what is known of paces, of what runs, and of who starts before."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import pytest

from common import keys
from common.broker import Broker
from common.cards import WorkerCard
from common.records import Claimed, Hold, NewTask, Submitted
from tests.conftest import resolved
from tests.fleet import record
from tests.servers import RedisServer

CardFn = Callable[[str], WorkerCard]
SMALL, LARGE = 64, 128


def submit(broker: Broker, side: int = SMALL, **changes: object) -> Submitted:
    request = resolved(width=side, height=side, **changes)
    return broker.submit(NewTask(task_id=secrets.token_hex(16), tenant="default", request=request))


def claim(broker: Broker, room: int = 1) -> list[Claimed]:
    return list(broker.claim("w1", "cpu", ["simulated"], room).tasks)


def learn(broker: Broker, side: int, picture_ms: float, n: int = 1) -> None:
    """Have a task done that took so long for each of its pictures."""
    submit(broker, side, n=n, priority="high")
    (task,) = claim(broker)
    broker.finish("w1", Hold(task.task_id, 1), "succeeded", busy_ms=n * picture_ms, picture_ms=picture_ms)


@pytest.fixture
def serve(broker: Broker, card: CardFn) -> Callable[..., None]:
    """Let there be workers that each advance so many pictures together."""

    def beat(workers: int = 1, capacity: int = 1, **changes: object) -> None:
        for number in range(workers):
            changed = {"capacity": capacity, **changes}
            broker.beat(card(f"w{number + 1}").model_copy(update=changed), [], 60)
        broker._limits_until = 0.0

    return beat


Serve = Callable[..., None]


def test_nothing_is_told_before_a_pace_and_a_worker_are_known(broker: Broker, serve: Serve) -> None:
    assert submit(broker).eta_seconds is None
    claim(broker)
    learn(broker, SMALL, 1000)
    assert submit(broker).eta_seconds is None
    serve()
    assert submit(broker).eta_seconds is not None
    serve(state="draining")
    assert submit(broker).eta_seconds is None, "who drains takes nothing any more"


def test_a_size_has_its_own_pace_and_an_unknown_one_its_models(broker: Broker, serve: Serve) -> None:
    serve()
    learn(broker, SMALL, 1000)
    learn(broker, LARGE, 1500)
    told = []
    for side in (SMALL, LARGE, 96):
        done = submit(broker, side)
        told.append(done.eta_seconds)
        broker.cancel(done.task_id, None)
    # of the model: 1250 ms for 2.5 times the cost of a small one, which the last has 2.25 times
    assert told == pytest.approx([1.0, 1.5, 1.125], rel=0.01)


def test_a_pace_follows_what_is_measured(broker: Broker, serve: Serve) -> None:
    serve()
    for picture_ms in (1000, *[2000] * 20):
        learn(broker, SMALL, picture_ms)
    assert submit(broker).eta_seconds == pytest.approx(2.0, rel=0.05)
    broker.finish("w1", Hold(claim(broker)[0].task_id, 1), "failed", busy_ms=60_000)
    assert submit(broker).eta_seconds == pytest.approx(2.0, rel=0.05), "of a failure nothing is learned"


def test_who_waits_gets_the_slot_that_frees_up_in_its_turn(broker: Broker, serve: Serve) -> None:
    serve(workers=2)
    learn(broker, SMALL, 10_000)
    first, second = submit(broker), submit(broker)
    assert (first.eta_seconds, second.eta_seconds) == (10, 10), "slots are free"
    claim(broker)
    time.sleep(0.5)
    claim(broker)
    estimates = [submit(broker).eta_seconds for _ in range(4)]
    assert estimates == pytest.approx([19.5, 20, 29.5, 30], abs=0.25)


def test_a_run_past_its_estimate_is_about_to_end(broker: Broker, serve: Serve) -> None:
    serve()
    learn(broker, SMALL, 100)
    submit(broker), claim(broker)
    time.sleep(0.15)
    assert submit(broker).eta_seconds == pytest.approx(0.1)


def test_pictures_take_slots_each_and_turns_where_a_worker_has_fewer(broker: Broker, serve: Serve) -> None:
    serve(workers=2, capacity=4)
    learn(broker, SMALL, 10_000, n=2)
    four = submit(broker, n=4)
    assert four.eta_seconds == 10
    assert submit(broker, n=8).eta_seconds == 20, "one worker makes them, four at once"
    assert submit(broker).eta_seconds == 20, "behind twelve pictures for eight slots"
    claim(broker)
    assert record(broker, four.task_id).eta_seconds == 10
    broker.progress("w1", {Hold(four.task_id, 1): (1, 4)})
    assert record(broker, four.task_id).eta_seconds == 7.5


@pytest.mark.parametrize("end", ["finish", "release", "reap"])
def test_a_run_that_is_over_takes_no_slot(broker: Broker, serve: Serve, redis_server: RedisServer, end: str) -> None:
    serve()
    learn(broker, SMALL, 1000)
    submit(broker, n=2, priority="low")
    (task,) = claim(broker, 4)
    assert redis_server.client.zcard(keys.DUE + "simulated") == 2
    if end == "finish":
        broker.finish("w1", Hold(task.task_id, 1), "failed")
    elif end == "release":
        broker.release("w1", Hold(task.task_id, 1))
    else:
        broker.reap("w1")
        serve()
    assert submit(broker).eta_seconds == pytest.approx(1.0)


def test_what_a_version_without_these_books_left_in_them_is_dropped(broker: Broker, redis_server: RedisServer) -> None:
    stale, fresh = int((time.time() - keys.OVERDUE_S - 10) * 1000), int(time.time() * 1000)
    redis_server.client.zadd(keys.DUE + "simulated", {"stale:1": stale, "fresh:1": fresh})
    running = submit(broker).task_id
    claim(broker)
    assert set(redis_server.client.zrange(keys.DUE + "simulated", 0, -1)) == {"fresh:1", f"{running}:1"}


def test_the_error_of_an_estimate_is_counted_once_its_task_has_succeeded(broker: Broker, serve: Serve) -> None:
    serve()
    learn(broker, SMALL, 100)
    assert broker.eta_errors() == {}, "no estimate, no error"
    submit(broker)
    (task,) = claim(broker)
    time.sleep(0.2)  # twice as long as estimated
    for _ in range(2):
        broker.finish("w1", Hold(task.task_id, 1), "succeeded", busy_ms=100)
    submit(broker)
    broker.finish("w1", Hold(claim(broker)[0].task_id, 1), "failed")
    told = broker.eta_errors()["simulated"]
    assert told.buckets[-1] == ("+Inf", 1)
    assert dict(told.buckets)["0.3"] == 0 and dict(told.buckets)["1"] == 1
    assert 0.4 < told.sum < 0.9
