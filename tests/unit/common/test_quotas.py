"""What a submit is refused for: caps, the quota of its API key, a deadline that the backlog cannot meet."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from common import keys
from common.broker import Broker
from common.cards import WorkerCard
from common.errors import QueueFull, QuotaUsedUp, TooLate
from common.records import Hold, NewTask, Submitted
from common.settings import Settings
from tests.conftest import resolved
from tests.servers import RedisServer

KEY = "0123456789ab"
CardFn = Callable[[str], WorkerCard]


def task(key_id: str = KEY, *, most: int | None = None, idempotency_key: str = "", **changes: object) -> NewTask:
    return NewTask(
        task_id=secrets.token_hex(16), tenant="default", key_id=key_id, max_queued=most,
        request=resolved(**changes), idempotency_key=idempotency_key, body_hash="b",
    )  # fmt: skip


def late(deadline_s: float, **changes: object) -> NewTask:
    """A task that is to be refused if it would be late."""
    return NewTask(
        task_id=secrets.token_hex(16), tenant="default", request=resolved(deadline_s=deadline_s, **changes),
        reject_if_late=True,
    )  # fmt: skip


def work(broker: Broker, picture_ms: float = 2_000.0, tasks: int = 1) -> None:
    """Claim and finish tasks, so that it is known how long one takes."""
    for claimed in broker.claim("w1", "cpu", ["simulated"], tasks).tasks:
        broker.finish("w1", Hold(claimed.task_id, claimed.fence), "succeeded", busy_ms=picture_ms)


def waiting(server: RedisServer, key_id: str = KEY) -> set[str]:
    found: set[str] = server.client.smembers(keys.QUEUED_OF + key_id)  # type: ignore[assignment]
    return found


def test_a_key_has_so_many_tasks_in_line_at_most(broker: Broker) -> None:
    for priority in ("high", "low"):
        broker.submit(task(most=2, priority=priority))
    refused = task(most=2, model="pico")
    with pytest.raises(QuotaUsedUp, match=r"2 tasks of this API key wait, of 2 at most; .*cancel one"):
        broker.submit(refused)
    assert broker.view(refused.task_id) is None
    assert broker.submit(task("ffffffffffff", most=2)).created
    assert broker.submit(task(most=3)).created
    assert broker.submit(task("", most=None)).created, "the open tenant has no key"


def test_what_leaves_the_line_makes_room(broker: Broker, redis_server: RedisServer) -> None:
    def submit(**changes: object) -> Submitted:
        return broker.submit(task(most=1, **changes))

    first = submit()
    (claimed,) = broker.claim("w1", "cpu", ["simulated"], 1).tasks
    second = submit()
    broker.cancel(second.task_id, None)
    submit(deadline_s=0.01)
    threading.Event().wait(0.05)
    broker.expire()
    late = submit(deadline_s=0.01)
    threading.Event().wait(0.05)
    assert broker.view(late.task_id) is not None  # which ends it
    submit(deadline_s=0.01)
    threading.Event().wait(0.05)
    broker.claim("w2", "cpu", ["simulated"], 1)  # as this does
    assert waiting(redis_server) == set()
    broker.release("w1", Hold(claimed.task_id, claimed.fence))
    assert waiting(redis_server) == {first.task_id}
    with pytest.raises(QuotaUsedUp):
        submit()


def test_a_task_taken_back_counts_again_and_the_last_one_leaves_no_trace(
    broker: Broker, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.broker.RECONCILE_GRACE_S", 0.0)
    mine = broker.submit(task()).task_id
    for _ in range(2):
        broker.claim("w1", "cpu", ["simulated"], 1)
        assert waiting(redis_server) == set()
        broker.reap("w1", [mine])
        redis_server.client.delete(keys.DEAD + "w1")
        assert waiting(redis_server) == {mine}
    redis_server.client.delete(keys.RQ_QUEUE + "simulated.normal.default")  # as `rq empty` does
    assert waiting(redis_server) == {mine}, "it is still to be done"
    assert broker.reconcile() == [(mine, "")]
    redis_server.client.delete(keys.RQ_QUEUE + "simulated.normal.default")
    broker.cancel(mine, None)
    assert waiting(redis_server) == set()
    for key in (keys.QUEUED_OF + KEY, keys.BACKLOG, keys.DUE + "simulated"):
        assert not redis_server.client.exists(key), key


def test_a_quota_is_exact_under_a_hundred_submits_at_once(settings: Settings, redis_server: RedisServer) -> None:
    brokers = [Broker(settings) for _ in range(4)]

    def submit(number: int) -> bool:
        try:
            return brokers[number % 4].submit(task(most=10)).created
        except QuotaUsedUp:
            return False

    with ThreadPoolExecutor(25) as threads:
        assert sum(threads.map(submit, range(100))) == 10
    assert len(waiting(redis_server)) == 10
    for broker in brokers:
        broker.close()


def test_what_was_accepted_is_never_refused(settings: Settings, broker: Broker) -> None:
    first = broker.submit(task(most=1, idempotency_key="k"))
    assert broker.submit(task(most=1, idempotency_key="k")) == first._replace(created=False)
    full = Broker(settings.model_copy(update={"fleet_cap": 1}))
    assert full.submit(task(most=1, idempotency_key="k")).task_id == first.task_id
    with pytest.raises(QuotaUsedUp):
        broker.submit(task(most=1, idempotency_key="l"))
    full.close()


@pytest.mark.parametrize(
    ("cap", "message"),
    [
        ("queue_cap", r"queue simulated.normal.default holds 2 tasks, its cap; .*ZFLEET_QUEUE_CAP"),
        ("fleet_cap", r"the fleet holds 2 tasks, its cap; .*ZFLEET_FLEET_CAP"),
    ],
)
def test_a_cap_is_named_with_what_to_do(settings: Settings, cap: str, message: str) -> None:
    broker = Broker(settings.model_copy(update={cap: 2}))
    for _ in range(2):
        broker.submit(task())
    with pytest.raises(QueueFull, match=message):
        broker.submit(task())
    if cap == "fleet_cap":
        work(broker)
    assert broker.submit(task(priority="high")).created
    broker.close()


def test_a_used_up_quota_says_when_the_first_may_begin(broker: Broker, card: CardFn) -> None:
    broker.beat(card("w1"), [], 60)
    with pytest.raises(QuotaUsedUp) as unknown:
        broker.submit(task(most=0))
    assert unknown.value.retry_after_s == 5.0
    broker.submit(task())
    work(broker)
    running, _first = broker.submit(task()), broker.submit(task(most=9))
    assert broker.claim("w1", "cpu", ["simulated"], 1).tasks[0].task_id == running.task_id
    with pytest.raises(QuotaUsedUp) as known:
        broker.submit(task(most=1))
    assert known.value.retry_after_s == pytest.approx(2.0, abs=0.5)


def test_a_deadline_that_the_backlog_cannot_meet_is_refused_with_the_estimate(broker: Broker, card: CardFn) -> None:
    broker.beat(card("w1"), [], 60)
    assert broker.submit(late(0.5)).created, "nothing is known yet"
    work(broker)
    assert broker.submit(late(2.5)).eta_seconds == pytest.approx(2.0)
    for _ in range(3):
        broker.submit(task())
    refused = late(7.0)
    with pytest.raises(TooLate, match=r"would end in 10\.0 s, after its deadline_s of 7; give it more time") as told:
        broker.submit(refused)
    assert told.value.retry_after_s == pytest.approx(3.0)
    assert [error.loc for error in told.value.errors] == ["deadline_s"]
    assert broker.view(refused.task_id) is None
    assert broker.submit(late(10.5)).created
    assert broker.submit(late(7.0, priority="high")).created
    assert broker.submit(task(deadline_s=7.0)).created, "it did not ask for that"
