"""Who starts before a task: what a position promises, against the order in which tasks are really claimed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from common import keys
from common.apikeys import ApiKey
from common.broker import Broker
from common.records import COST_PARTS, Hold, NewTask
from common.schemas import Priority
from common.settings import Settings
from tests.conftest import SubmitFn, resolved
from tests.fleet import record
from tests.servers import RedisServer

TENANTS = ("a", "b-1", "b1", "c")
SHARES = (0.5, 1, 2, 3, 7)
Backlog = Mapping[str, tuple[int, int]]  # tenant -> steps of each of its tasks, and how many it has

tried = hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
backlogs = st.dictionaries(st.sampled_from(TENANTS), st.tuples(st.integers(1, 6), st.integers(1, 8)), min_size=1)


def put(
    broker: Broker, tenant: str, steps: int, priority: Priority = "normal", size: tuple[int, int] = (1000, 1000)
) -> str:
    """Submit a task that by default costs `steps`."""
    request = resolved(width=size[0], height=size[1], steps=steps, priority=priority)
    done = broker.submit(NewTask(task_id=secrets.token_hex(16), tenant=tenant, request=request))
    return done.task_id


def fill(
    broker: Broker, backlog: Backlog, priority: Priority = "normal", size: tuple[int, int] = (1000, 1000)
) -> list[str]:
    queues = backlog.items()
    return [put(broker, tenant, steps, priority, size) for tenant, (steps, tasks) in queues for _ in range(tasks)]


def claimed(broker: Broker, count: int) -> list[str]:
    """Claim up to so many tasks, one after another."""
    return [task.task_id for _ in range(count) for task in broker.claim("w1", "cpu", ["simulated"], 1).tasks]


def test_a_submit_tells_the_position_that_the_status_tells(broker: Broker) -> None:
    for tenant, steps in (("a", 2), ("b", 3), ("a", 2), ("c", 1), ("a", 2), ("b", 3)):
        request = resolved(width=1000, height=1000, steps=steps)
        done = broker.submit(NewTask(task_id=secrets.token_hex(16), tenant=tenant, request=request))
        assert record(broker, done.task_id).position == done.position


def told(broker: Broker, task_ids: Sequence[str]) -> list[str]:
    """The tasks in the order that their positions tell, which must be 0, 1, 2 …"""
    positions = {task_id: record(broker, task_id).position for task_id in task_ids}
    assert sorted(positions.values(), key=lambda position: position or 0) == list(range(len(task_ids)))
    return sorted(task_ids, key=lambda task_id: positions[task_id] or 0)


@tried
@given(
    size=st.sampled_from([(1000, 1000), (80, 64)]),
    first=backlogs, begun=st.integers(0, 12), more=backlogs, high=backlogs, low=backlogs,
)  # fmt: skip
def test_positions_are_the_order_in_which_tasks_are_claimed(
    broker: Broker,
    redis_server: RedisServer,
    size: tuple[int, int],
    first: Backlog,
    begun: int,
    more: Backlog,
    high: Backlog,
    low: Backlog,
) -> None:
    """Some of the tasks have been claimed before others come, and some of those are given back."""
    redis_server.flush()
    ids = fill(broker, first, size=size)
    gone = claimed(broker, begun)
    more = {tenant: (first.get(tenant, asked)[0], asked[1]) for tenant, asked in more.items()}
    queues: list[tuple[Backlog, Priority]] = [(more, "normal"), (low, "low"), (high, "high")]
    for backlog, priority in queues:
        ids += fill(broker, backlog, priority, size)
    if gone:
        broker.release("w1", Hold(gone.pop(), 1))
    waiting = [task_id for task_id in ids if task_id not in gone]
    expected = told(broker, waiting)
    assert claimed(broker, len(waiting)) == expected


@tried
@given(backlog=backlogs, shares=st.fixed_dictionaries({tenant: st.sampled_from(SHARES) for tenant in TENANTS}))
def test_positions_heed_the_shares(
    broker: Broker, redis_server: RedisServer, backlog: Backlog, shares: Mapping[str, float]
) -> None:
    redis_server.flush()
    for number, (tenant, share) in enumerate(shares.items()):
        key = ApiKey(key_id=f"{number:012x}", tenant=tenant, digest="", created_at=datetime.now(UTC))
        broker.put_key(key, share)
    ids = fill(broker, backlog)
    starts = iter(
        (ceil(Fraction(steps) / Fraction(shares[tenant]) * COST_PARTS) * index, tenant, index)
        for tenant, (steps, tasks) in backlog.items()
        for index in range(tasks)
    )
    expected = [task_id for _, task_id in sorted(zip(starts, ids, strict=True))]  # by virtual start, then by name
    assert told(broker, ids) == expected == claimed(broker, len(ids))


def test_where_tasks_of_a_queue_differ_a_position_is_an_estimate_by_their_mean(broker: Broker) -> None:
    for steps in (1, 5, 3, 3):
        put(broker, "a", steps)
    mine = [put(broker, "b", 3) for _ in range(4)]
    assert [record(broker, task_id).position for task_id in mine] == [1, 3, 5, 7]


def test_a_newcomer_stands_before_a_long_backlog(broker: Broker) -> None:
    ids = [put(broker, "big", 4) for _ in range(30)]
    assert claimed(broker, 3) == ids[:3]
    assert record(broker, put(broker, "new", 4)).position == 0
    assert record(broker, ids[-1]).position == 27


def test_more_tenants_than_are_looked_at_count_like_those_on_average(broker: Broker) -> None:
    for number in range(80):
        put(broker, f"t{number:02}", 4, "high" if number % 2 else "normal")
    for number in range(80, 160):
        put(broker, f"t{number:02}", 4)
    late = put(broker, "zz", 4)
    assert record(broker, late).position == 160


def test_a_queue_emptied_behind_the_brokers_back_is_booked_anew(
    broker: Broker, submit: SubmitFn, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.broker.RECONCILE_GRACE_S", 0.0)
    ids = [submit(tenant="a") for _ in range(3)]
    before = redis_server.client.hget(keys.BACKLOG, "simulated.normal.a")
    redis_server.client.delete(keys.RQ_QUEUE + "simulated.normal.a")  # as `rq empty` does
    other = submit(tenant="b")
    assert sorted(moved.task_id for moved in broker.reconcile()) == sorted(ids)
    assert redis_server.client.hget(keys.BACKLOG, "simulated.normal.a") == before
    assert record(broker, other).position == 1
    for task_id in [*ids, other]:
        broker.cancel(task_id, None)
    assert not redis_server.client.exists(keys.BACKLOG)


def test_the_books_are_right_whatever_becomes_of_the_tasks(
    broker: Broker, settings: Settings, submit: SubmitFn, redis_server: RedisServer
) -> None:
    ids = [submit(n=n) for n in (1, 2, 3, 1, 1)]
    broker.cancel(ids[3], None)
    for hold in [Hold(task_id, 1) for task_id in claimed(broker, 3)]:
        broker.release("w1", hold)
    (task,) = broker.claim("w1", "cpu", ["simulated"], 1).tasks
    waiting = set(ids) - {ids[3], task.task_id}
    entry = redis_server.client.hget(keys.BACKLOG, "simulated.normal.default") or ""
    cost, tasks, pictures = (float(part) for part in entry.split(" "))
    records = [record(broker, task_id).request for task_id in waiting]
    assert (tasks, pictures) == (len(waiting), sum(request.n for request in records))
    assert cost == pytest.approx(sum(64 * 64 / 1e6 * 4 * request.n for request in records), rel=1e-4)
