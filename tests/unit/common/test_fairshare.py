"""GPUs are shared among waiting tenants in proportion to their shares, whatever their backlogs."""

from __future__ import annotations

import random
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from common import keys
from common.broker import Broker
from common.link import SCRIPTS
from common.records import Claimed, NewTask
from common.settings import Settings
from tests.conftest import SubmitFn, resolved
from tests.servers import RedisServer

SHARES = {"a": 1.0, "b": 1.0, "c": 2.0}


class Flood(Broker):
    """Submits many tasks in one go."""

    def _run(self, script: str, *args: Any, give_up: Callable[[], bool] | None = None) -> Any:
        self.pipeline.evalsha(SCRIPTS[script][1], 0, *args)
        return ["created", args[0], 0, ""]

    def flood(self, tenant: str, count: int, **changes: object) -> list[str]:
        """Submit so many tasks of a tenant; return their ids."""
        self._redis.script_load(SCRIPTS["submit"][0])
        self.pipeline = self._redis.pipeline(transaction=False)
        request = resolved(**changes)
        ids = [secrets.token_hex(16) for _ in range(count)]
        for task_id in ids:
            self.submit(NewTask(task_id=task_id, tenant=tenant, request=request))
        self.pipeline.execute()
        return ids


FloodFn = Callable[..., list[str]]


@pytest.fixture
def flood(settings: Settings) -> Iterable[FloodFn]:
    broker = Flood(settings)
    yield broker.flood
    broker.close()


def share(redis_server: RedisServer, shares: Mapping[str, float]) -> None:
    redis_server.client.hset(keys.SHARES, mapping=dict(shares))


def take(
    broker: Broker, room: int = 1, models: Sequence[str] = ("simulated",), worker: str = "w1", **options: Any
) -> list[Claimed]:
    return list(broker.claim(worker, "cpu", models, room, **options).tasks)


def tenant_of(task: Claimed) -> str:
    return task.queue.rpartition(".")[2]


def cost(task: Claimed) -> float:
    return NewTask(task_id="", tenant="", request=task.request).cost


def tenants(broker: Broker, count: int, **options: Any) -> list[str]:
    """Whose tasks the next claims of one task each are."""
    return [tenant_of(task) for _ in range(count) for task in take(broker, **options)]


@pytest.mark.parametrize(("workers", "room"), [(1, 1), (5, 3)])
def test_unequal_backlogs_get_their_shares(
    broker: Broker, flood: FloodFn, redis_server: RedisServer, workers: int, room: int
) -> None:
    share(redis_server, SHARES)
    flood("a", 10_000, steps=4)
    flood("b", 500, steps=8)
    flood("c", 200, steps=4, width=128, height=128)
    given_: Counter[str] = Counter()
    while redis_server.client.llen(keys.RQ_QUEUE + "simulated.normal.c"):
        for worker in range(workers):
            for task in take(broker, room, worker=f"w{worker}"):
                given_[tenant_of(task)] += cost(task)
    total = sum(given_.values())
    for tenant, part in SHARES.items():
        assert given_[tenant] / total == pytest.approx(part / 4, rel=0.05), given_


def test_a_newcomer_is_next_whatever_the_backlog(broker: Broker, flood: FloodFn, submit: SubmitFn) -> None:
    flood("big", 10_000, steps=9)
    take(broker, 7)
    newcomer = submit(tenant="new")
    assert [task.task_id for task in take(broker)] == [newcomer]


def test_a_newcomer_on_another_model_is_next(broker: Broker, flood: FloodFn, submit: SubmitFn) -> None:
    models = ("turbo", "base")
    flood("big", 2_000, model="turbo", steps=9)
    assert tenants(broker, 20, models=models) == ["big"] * 20
    newcomer = submit(tenant="new", model="base")
    assert [task.task_id for task in take(broker, models=models)] == [newcomer]
    flood("new", 50, model="base", steps=9)
    assert Counter(tenants(broker, 20, models=models))["new"] == pytest.approx(10, abs=1)


def test_a_tenant_of_two_models_gets_one_share(broker: Broker, flood: FloodFn) -> None:
    for model in ("turbo", "base"):
        flood("both", 100, model=model)
    flood("one", 100, model="turbo"), flood("other", 100, model="base")
    served = Counter(tenants(broker, 90, models=("turbo", "base")))
    assert all(count == pytest.approx(30, abs=1) for count in served.values()), served


def test_workers_of_different_models_are_independent(broker: Broker, flood: FloodFn) -> None:
    """What a tenant has where nobody else waits costs it nothing elsewhere."""
    flood("a", 300, model="turbo"), flood("a", 100, model="base"), flood("b", 100, model="base")
    assert tenants(broker, 200, models=("turbo",)) == ["a"] * 200
    assert Counter(tenants(broker, 60, models=("base",), worker="w2")) == {"a": 30, "b": 30}


def test_tasks_of_a_tenant_go_first_come_first_served(broker: Broker, submit: SubmitFn) -> None:
    models = ("turbo", "base")
    order: dict[str, list[str]] = defaultdict(list)
    drawn = random.Random(6)
    for _ in range(60):
        tenant = drawn.choice("abc")
        order[tenant].append(submit(tenant=tenant, model=drawn.choice(models), steps=drawn.randint(1, 9)))
        time.sleep(0.002)  # as tasks of the same millisecond are of the same age
    taken: dict[str, list[str]] = defaultdict(list)
    while found := take(broker, models=models):
        for task in found:
            taken[tenant_of(task)].append(task.task_id)
    assert taken == order


def test_no_model_of_a_tenant_waits_for_another_of_its_models(broker: Broker, submit: SubmitFn) -> None:
    """Its oldest task is next, whoever is first in that line."""
    models = ("turbo", "base")
    old = submit(tenant="b", model="base")
    time.sleep(0.002)
    for _ in range(20):
        submit(tenant="b", model="turbo")
    time.sleep(0.002)
    for _ in range(20):
        submit(tenant="a", model="base")
    assert old in [task.task_id for _ in range(3) for task in take(broker, models=models)]


def test_idling_earns_no_credit(broker: Broker, flood: FloodFn) -> None:
    flood("idle", 1)
    flood("busy", 300)
    tenants(broker, 200)
    flood("idle", 50)
    served = tenants(broker, 40)
    assert Counter(served) == {"busy": 20, "idle": 20}
    assert served[:4] in (["idle", "busy"] * 2, ["busy", "idle"] * 2)


def test_a_debt_is_forgotten_once_others_have_caught_up(broker: Broker, flood: FloodFn) -> None:
    flood("a", 1, steps=100), flood("b", 300)  # of 4 steps
    assert sorted(tenants(broker, 6)) == ["a"] + ["b"] * 5
    flood("a", 100)
    assert tenants(broker, 19) == ["b"] * 19, "this much it has had in advance"
    tenants(broker, 3)
    assert Counter(tenants(broker, 40))["a"] == pytest.approx(20, abs=1)


def test_of_tenants_gone_nothing_is_left(broker: Broker, submit: SubmitFn, redis_server: RedisServer) -> None:
    models = ("turbo", "base")
    for tenant in range(50):
        submit(tenant=f"t{tenant}", model="turbo")
    for _ in range(5):
        submit(tenant="stays", model="turbo")
    tenants(broker, 55, models=models)
    for model in models:
        assert redis_server.client.zcard(f"{keys.TAGS}{model}.normal") <= 1, "those behind the clock are worth nothing"


def test_models_that_others_advance_keep_their_shares_and_hold_up_nobody(
    broker: Broker, flood: FloodFn, redis_server: RedisServer
) -> None:
    """One worker has turbo in memory and nine have base; all may serve both."""
    models = ("turbo", "base")
    share(redis_server, {"a": 1, "b": 2})
    for tenant in ("a", "b"):
        for model in models:
            flood(tenant, 600, model=model)
    served: dict[str, Counter[str]] = {model: Counter() for model in models}
    for turn in range(300):
        model = "turbo" if turn % 10 == 0 else "base"
        (task,) = take(broker, models=models, worker=model, resident=[model], busy=True)
        served[model][tenant_of(task)] += 1
    for model, counts in served.items():
        assert counts["b"] == pytest.approx(2 * counts["a"], rel=0.2), (model, served)
    newcomer = flood("new", 40, model="turbo")[0]
    assert take(broker, models=models, worker="turbo")[0].task_id == newcomer
    assert "a" in tenants(broker, 8, models=models, worker="base"), "no backlog has arrears to catch up on"


def test_what_a_tenant_has_of_one_model_is_no_debt_with_another_that_lags_behind(
    broker: Broker, flood: FloodFn
) -> None:
    models = ("turbo", "base")
    flood("a", 200, model="turbo"), flood("a", 20, model="base"), flood("b", 60, model="base")
    assert tenants(broker, 100, models=models, resident=["turbo"], busy=True) == ["a"] * 100
    assert Counter(tenants(broker, 20, models=models, worker="w2", resident=["base"], busy=True)) == {"a": 10, "b": 10}


def test_a_model_whose_tasks_are_all_too_large_keeps_its_own_time(broker: Broker, flood: FloodFn) -> None:
    models = ("turbo", "base")
    flood("a", 100, model="turbo"), flood("large", 100, model="base", width=96)
    tenants(broker, 80, models=models, largest={"base": 64 * 64})
    flood("new", 1, model="base", width=96)
    assert "new" in tenants(broker, 2, models=("base",), worker="w2")


def test_what_another_worker_was_given_alone_is_no_arrears(broker: Broker, flood: FloodFn) -> None:
    """Once the workers are gone that ran ahead with one model, both models' tenants share what is left."""
    flood("x", 400, model="turbo"), flood("y", 900, model="base")
    for _ in range(30):
        take(broker, models=("turbo", "base"))
        take(broker, 20, models=("base",), worker="w2")
    assert Counter(tenants(broker, 40, models=("turbo", "base")))["y"] == pytest.approx(20, abs=2)


def test_larger_tasks_take_turns_on_a_larger_worker_while_a_small_one_runs_ahead(
    broker: Broker, flood: FloodFn
) -> None:
    for tenant in ("a", "b"):
        flood(tenant, 200, width=96)
    flood("small", 600)
    served: Counter[str] = Counter()
    for _ in range(45):
        take(broker, 10, worker="small", largest={"simulated": 64 * 64})
        served.update(tenants(broker, 1, worker="large"))
    assert served["b"] == pytest.approx(served["a"], abs=2), served


SHARE = st.sampled_from([0.5, 1.0, 1.5, 2.0, 4.0])
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(1, 16)),  # a submit: tenant, model, steps
        st.none(),  # a claim
    ),
    min_size=20,
    max_size=120,
)


@pytest.mark.parametrize("models", [("simulated",), ("turbo", "base")], ids=["one", "two"])
@examples(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shares=st.lists(SHARE, min_size=4, max_size=4), operations=OPERATIONS)
def test_two_waiting_tenants_never_drift_apart(
    broker: Broker,
    redis_server: RedisServer,
    models: Sequence[str],
    shares: list[float],
    operations: list[tuple[int, int, int] | None],
) -> None:
    """The bound of start-time fair queueing: while both wait, what two tenants are given, each by its share, differs by
    the largest task of each at most.
    """
    redis_server.flush()
    share(redis_server, {f"t{tenant}": value for tenant, value in enumerate(shares)})
    queued: Counter[int] = Counter()
    largest: Counter[int] = Counter()
    apart: dict[tuple[int, int], list[float]] = {}  # pair that waits -> how far apart it was, since both do
    rest = [None] * sum(operation is not None for operation in operations)
    for operation in [*operations, *rest]:
        if operation:
            tenant, model, steps = operation
            request = resolved(model=models[model % len(models)], steps=steps)
            task = NewTask(task_id=secrets.token_hex(16), tenant=f"t{tenant}", request=request)
            broker.submit(task)
            queued[tenant] += 1
            largest[tenant] = max(largest[tenant], task.cost / shares[tenant])
        else:
            for claimed in take(broker, models=models):
                tenant = int(tenant_of(claimed)[1:])
                queued[tenant] -= 1
                for pair, values in apart.items():
                    if tenant in pair:
                        sign = 1 if tenant == pair[0] else -1
                        values.append(values[-1] + sign * cost(claimed) / shares[tenant])
                        bound = largest[pair[0]] + largest[pair[1]] + 1e-4
                        assert max(values) - min(values) <= bound, (pair, values, bound)
        waiting = {(i, j) for i in range(4) for j in range(i) if queued[i] and queued[j]}
        apart = {pair: apart.get(pair, [0.0]) for pair in waiting}
    assert not +queued, "nobody starves"


def test_a_claim_among_a_thousand_tenants_takes_no_longer(broker: Broker, flood: FloodFn) -> None:
    def claim_ms(line: int, model: str) -> float:
        for tenant in range(line):
            flood(f"t{tenant}", 2, model=model)
        best = []
        for _ in range(100):
            began = time.perf_counter()
            assert take(broker, models=(model,))
            best.append(time.perf_counter() - began)
        return sorted(best)[10]

    assert claim_ms(1_000, "turbo") < 3 * claim_ms(60, "base")
