"""No API key has more tasks on GPUs than it may, nobody else waits for it, and nothing of it is stranded."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from common import keys
from common.apikeys import ApiKey
from common.broker import Broker
from common.records import Claimed, Hold, NewTask
from common.settings import Settings
from tests.conftest import resolved
from tests.servers import RedisServer, eventually

READY = keys.READY + "simulated.normal"


def api_key(key_id: str, max_running: int | None, *, revoked: bool = False) -> ApiKey:
    now = datetime.now(UTC)
    return ApiKey(
        key_id=key_id,
        tenant="t",
        digest="",
        max_running=max_running,
        created_at=now,
        revoked_at=now if revoked else None,
    )


@pytest.fixture
def queue(broker: Broker) -> Callable[..., list[str]]:
    """Submit so many tasks with a key."""

    def submit(key_id: str, count: int = 1, *, tenant: str = "t", **changes: object) -> list[str]:
        ids = [secrets.token_hex(16) for _ in range(count)]
        for task_id in ids:
            broker.submit(NewTask(task_id=task_id, tenant=tenant, key_id=key_id, request=resolved(**changes)))
        return ids

    return submit


QueueFn = Callable[..., list[str]]


def take(broker: Broker, room: int = 9, worker: str = "w1") -> list[Claimed]:
    return list(broker.claim(worker, "cpu", ["simulated"], room).tasks)


def taken(broker: Broker, room: int = 9, worker: str = "w1") -> list[str]:
    return [task.task_id for task in take(broker, room, worker)]


def hold(task: Claimed) -> Hold:
    return Hold(task.task_id, task.fence)


def finish(broker: Broker, task: Claimed, worker: str = "w1") -> None:
    assert broker.finish(worker, hold(task), "succeeded") == "ok"


def test_a_key_has_no_more_on_gpus_than_it_may(broker: Broker, queue: QueueFn) -> None:
    broker.put_key(api_key("k", 2))
    tasks = queue("k", 5)
    running = take(broker)
    assert [task.task_id for task in running] == tasks[:2]
    assert taken(broker) == []
    finish(broker, running[0])
    assert taken(broker) == tasks[2:3]


def test_a_key_without_a_limit_has_none(broker: Broker, queue: QueueFn) -> None:
    broker.put_key(api_key("k", None))
    tasks = queue("k", 3) + queue("unknown", 3) + queue("", 3)
    assert taken(broker, 20) == tasks


def test_nobody_else_waits_for_a_key_at_its_limit(broker: Broker, queue: QueueFn, redis_server: RedisServer) -> None:
    broker.put_key(api_key("k", 1))
    mine = queue("k", 40)
    others = queue("o", 3, tenant="other")
    assert sorted(taken(broker)) == sorted([mine[0], *others])
    assert taken(broker) == []
    assert not redis_server.client.exists(READY), "no claim looks at it again until one of its runs ends"
    assert queue("k2", 1, tenant="third") == taken(broker)


def test_a_task_of_another_key_of_the_tenant_goes_first(broker: Broker, queue: QueueFn) -> None:
    broker.put_key(api_key("k", 1))
    mine, other, last = queue("k", 3), queue("free", 2), queue("k", 1)
    running = take(broker)
    assert [task.task_id for task in running] == [mine[0], *other]
    finish(broker, running[0])
    (running[0],) = take(broker)
    assert running[0].task_id == mine[1], "in its key's own order"
    finish(broker, running[0])
    finish(broker, take(broker)[0])
    assert taken(broker) == last


def test_what_stands_behind_many_of_a_key_at_its_limit_comes_when_they_go(broker: Broker, queue: QueueFn) -> None:
    broker.put_key(api_key("k", 1))
    mine = queue("k", 20)
    other = queue("free", 1)
    assert taken(broker) == mine[:1]
    assert taken(broker) == []
    for task_id in mine[10:]:
        broker.cancel(task_id, "t")
    assert broker.wait(["simulated"]), "a worker is woken for it"
    assert taken(broker) == other


@pytest.mark.parametrize("end", ["succeeded", "failed", "canceled", "released", "crashed", "silent", "forgotten"])
def test_whichever_way_a_run_ends_the_next_is_picked_up_at_once(
    broker: Broker, queue: QueueFn, redis_server: RedisServer, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.put_key(api_key("k", 1))
    tasks = queue("k", 2)
    (task,) = take(broker)
    assert taken(broker, worker="w2") == []
    while broker.wait(["simulated"], 0.01):
        pass
    if end in ("succeeded", "failed", "canceled"):
        broker.finish("w1", hold(task), end)
    elif end == "released":
        broker.release("w1", hold(task))
    elif end == "crashed":
        broker.reap("w1", [task.task_id])
    elif end == "silent":
        broker.reap()
        redis_server.client.delete(keys.REAP_GRACE)
        redis_server.client.zadd(keys.LEASES, {task.task_id: 1})
        broker.reap()
    else:
        monkeypatch.setattr("common.broker.RECONCILE_GRACE_S", 0.0)
        redis_server.client.zrem(keys.LEASES, task.task_id)
        broker.reconcile()
    assert broker.wait(["simulated"], 0.1), "the bell rings"
    again = end in ("released", "crashed", "silent", "forgotten")
    assert taken(broker, worker="w2") == [tasks[0] if again else tasks[1]]


def test_a_limit_that_is_raised_counts_at_once(broker: Broker, queue: QueueFn) -> None:
    broker.put_key(api_key("k", 1))
    tasks = queue("k", 4)
    assert [taken(broker), taken(broker)] == [tasks[:1], []]
    while broker.wait(["simulated"], 0.01):
        pass
    broker.put_key(api_key("k", 3))
    assert broker.wait(["simulated"], 0.1)
    assert taken(broker) == tasks[1:3]
    broker.put_key(api_key("k", None))
    assert taken(broker) == tasks[3:]


def test_tasks_of_a_revoked_key_still_run(broker: Broker, queue: QueueFn) -> None:
    broker.put_key(api_key("k", 1))
    tasks = queue("k", 3)
    running = take(broker)
    broker.put_key(api_key("k", 1, revoked=True))
    for following in tasks[1:]:
        assert taken(broker) == []
        finish(broker, running.pop())
        running = take(broker)
        assert [task.task_id for task in running] == [following]


def test_who_was_parked_has_no_credit(broker: Broker, queue: QueueFn) -> None:
    broker.put_key(api_key("k", 1))
    queue("k", 60), queue("", 200, tenant="other")
    (task,) = [task for task in take(broker, 2) if task.queue.endswith(".t")]
    take(broker, 100)
    broker.put_key(api_key("k", None))
    served = Counter(task.queue.rpartition(".")[2] for task in take(broker, 20))
    assert served == {"t": 10, "other": 10}
    finish(broker, task)


def test_a_small_worker_parks_nobody_whose_task_another_may_take(broker: Broker, queue: QueueFn) -> None:
    broker.put_key(api_key("k", 1))
    first, _, large = queue("k", 1), queue("k", 1), queue("", 1, width=80)
    assert taken(broker, 1) == first
    assert broker.claim("small", "cpu", ["simulated"], 4, largest={"simulated": 64 * 64}).tasks == []
    assert taken(broker, worker="w2") == large


def test_a_reconciler_forgets_runs_that_are_none(
    broker: Broker, queue: QueueFn, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.put_key(api_key("k", 1))
    tasks = queue("k", 2)
    redis_server.client.sadd(keys.RUNNING_OF + "k", "gone", tasks[1])
    assert taken(broker) == []
    monkeypatch.setattr("common.broker.RECONCILE_GRACE_S", 0.0)
    assert broker.reconcile() == []
    assert taken(broker) == tasks[:1]


def test_under_crashes_and_cancels_no_limit_is_passed_and_nothing_stranded(
    settings: Settings, broker: Broker, queue: QueueFn, redis_server: RedisServer
) -> None:
    limits = {"k1": 2, "k2": 1, "k3": 4}
    for key_id, most in limits.items():
        broker.put_key(api_key(key_id, most))
    owner: dict[str, str] = {}
    for round_ in range(40):
        for key_id in (*limits, "free"):
            owner |= dict.fromkeys(queue(key_id, 1, tenant=f"t{round_ % 2}"), key_id)
    running: Counter[str] = Counter()
    passed: list[str] = []
    lock = threading.Lock()

    def ends(task: Claimed) -> None:
        with lock:
            running[owner[task.task_id]] -= 1

    def work(name: str, drawn: random.Random) -> None:
        mine = Broker(settings)
        life, quiet_since = 0, time.monotonic()
        while time.monotonic() - quiet_since < 1.0:
            worker = f"{name}.{life}"
            tasks = take(mine, drawn.randint(1, 3), worker)
            with lock:
                for task in tasks:
                    running[owner[task.task_id]] += 1
                passed.extend(key_id for key_id, most in limits.items() if running[key_id] > most)
            quiet_since = time.monotonic() if tasks else quiet_since
            if not tasks:
                mine.wait(["simulated"], 0.05)
            elif drawn.random() < 0.2:  # it dies with all it holds
                for task in tasks:
                    ends(task)
                mine.reap(worker)
                life += 1
                continue
            for task in tasks:
                ends(task)
                outcome = drawn.random()
                if outcome < 0.2:
                    mine.release(worker, hold(task))
                elif outcome < 0.3:
                    mine.cancel(task.task_id, None)
                    mine.release(worker, hold(task))
                else:
                    mine.finish(worker, hold(task), "succeeded")
        mine.close()

    threads = [threading.Thread(target=work, args=(f"w{i}", random.Random(i))) for i in range(6)]
    for thread in threads:
        thread.start()
    for task_id in random.Random(9).sample(sorted(owner), 30):
        broker.cancel(task_id, None)
    for thread in threads:
        thread.join(30)
    assert passed == []
    eventually(lambda: not broker.pending(), within_s=1)
    assert not list(redis_server.client.scan_iter(keys.RUNNING_OF + "*"))
    assert not list(redis_server.client.scan_iter(keys.PARKED + "*"))
