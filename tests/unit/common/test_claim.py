"""Which model's tasks a worker is given when it serves several and not all of them are in memory."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence

import pytest

from common import keys
from common.broker import Broker
from common.records import Hold
from common.settings import Settings
from tests.conftest import SubmitFn
from tests.servers import RedisServer

MODELS = ("pico", "turbo", "base")
Age = Callable[[str, float], None]


@pytest.fixture
def age(redis_server: RedisServer) -> Age:
    """Let a task have been submitted so many seconds ago."""

    def make_older(task_id: str, seconds: float) -> None:
        created = int(redis_server.client.hget(keys.TASK + task_id, "created_at") or 0)
        redis_server.client.hset(keys.TASK + task_id, "created_at", created - int(seconds * 1000))

    return make_older


def take(
    broker: Broker, room: int, resident: Sequence[str], *, worker: str = "w1", bound_s: float = 20.0, busy: bool = False
) -> list[str]:
    claim = broker.claim(worker, "cpu", MODELS, room, resident=resident, bound_s=bound_s, busy=busy)
    return [task.task_id for task in claim.tasks]


def test_a_task_whose_model_is_in_memory_goes_before_an_older_one(broker: Broker, submit: SubmitFn, age: Age) -> None:
    turbo = submit(model="turbo")
    age(turbo, 10)
    pico = submit(model="pico")
    assert take(broker, 1, ["pico"]) == [pico]
    assert take(broker, 1, ["pico"]) == [turbo]


def test_a_higher_priority_goes_before_what_is_in_memory(broker: Broker, submit: SubmitFn) -> None:
    pico, turbo = submit(model="pico"), submit(model="turbo", priority="high")
    assert take(broker, 1, ["pico"]) == [turbo]
    assert take(broker, 1, ["pico"]) == [pico]


def test_past_the_bound_a_task_waits_no_longer(broker: Broker, submit: SubmitFn, age: Age) -> None:
    pico, turbo, base = submit(model="pico"), submit(model="turbo"), submit(model="base")
    age(pico, 60)
    age(turbo, 21)
    age(base, 22)
    assert [take(broker, 1, ["pico"], busy=True) for _ in range(3)] == [[base], [turbo], [pico]]


def test_without_a_bound_it_is_first_come_first_served(broker: Broker, submit: SubmitFn, age: Age) -> None:
    turbo, pico = submit(model="turbo"), submit(model="pico")
    age(turbo, 0.1)
    assert take(broker, 1, ["pico"], bound_s=0.0) == [turbo]
    assert take(broker, 1, ["pico"], bound_s=0.0) == [pico]


def test_models_in_memory_share_by_the_age_of_their_tasks(broker: Broker, submit: SubmitFn, age: Age) -> None:
    tasks = [submit(model=model) for model in ("pico", "turbo", "pico", "turbo")]
    for index, task_id in enumerate(tasks):
        age(task_id, 10 - index)
    assert take(broker, 4, ["turbo", "pico"]) == tasks


def test_the_oldest_task_counts_whichever_tenant_is_next(broker: Broker, submit: SubmitFn, age: Age) -> None:
    """A tenant that is out of turn must not keep its model from being seen to wait."""
    for _ in range(2):
        submit(model="turbo", tenant="a")
    assert take(broker, 1, ["turbo"])  # so that tenant a stands behind a newcomer
    pico = submit(model="pico")
    late = broker.claim("w2", "cpu", ["turbo"], 1).tasks[0].task_id
    assert broker.release("w2", hold(broker, late)) == "ok"
    age(late, 30)
    submit(model="turbo", tenant="b")
    first = take(broker, 1, ["pico"])
    assert first != [pico], "turbo is past the bound"


def hold(broker: Broker, task_id: str) -> Hold:
    record = broker.view(task_id)
    assert record is not None
    return Hold(task_id, len(record.attempts))


def test_a_busy_worker_leaves_what_it_would_have_to_load_until_it_is_idle(broker: Broker, submit: SubmitFn) -> None:
    turbo = submit(model="turbo")
    assert take(broker, 4, ["pico"], busy=True) == []
    assert take(broker, 4, ["pico"]) == [turbo]


def test_what_it_takes_makes_a_worker_busy(broker: Broker, submit: SubmitFn) -> None:
    turbo, pico = submit(model="turbo"), submit(model="pico")
    assert take(broker, 4, ["pico"]) == [pico]
    assert take(broker, 4, ["turbo"], worker="w2") == [turbo]


def test_nothing_of_a_lower_priority_overtakes_a_task_that_waits_for_a_worker_to_load(
    broker: Broker, submit: SubmitFn
) -> None:
    turbo, pico = submit(model="turbo"), submit(model="pico", priority="low")
    assert take(broker, 4, ["pico"], busy=True) == []
    assert take(broker, 1, ["pico"]) == [turbo]
    assert take(broker, 4, ["pico"]) == [pico]


def test_a_claim_makes_a_worker_load_one_model_only(broker: Broker, submit: SubmitFn) -> None:
    turbo = [submit(model="turbo") for _ in range(2)]
    submit(model="base"), submit(model="turbo", priority="low")
    assert take(broker, 9, []) == turbo
    assert broker.queues()[0].model == "base"


def test_tenants_share_within_a_model(broker: Broker, submit: SubmitFn) -> None:
    for _ in range(20):
        submit(model="pico", tenant="big"), submit(model="turbo", tenant="big")
    submit(model="pico", tenant="small")
    claim = broker.claim("w1", "cpu", MODELS, 2, resident=["pico"])
    assert sorted(task.queue for task in claim.tasks) == ["pico.normal.big", "pico.normal.small"]


def test_a_claim_that_is_sent_again_gives_the_same_tasks(
    broker: Broker, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    turbo = [submit(model="turbo") for _ in range(2)]
    monkeypatch.setattr(secrets, "token_hex", lambda _: "same token")
    assert [take(broker, 1, ["pico"]) for _ in range(2)] == [turbo[:1], turbo[:1]]


def test_a_worker_that_leaves_a_task_behind_rings_for_one_that_may_take_it(broker: Broker, submit: SubmitFn) -> None:
    submit(model="turbo")
    assert broker.wait(["turbo"])
    assert take(broker, 4, ["pico"], busy=True) == []
    began = time.monotonic()
    assert not broker.wait(["pico"], 0.1)
    assert time.monotonic() - began < 0.9
    assert broker.wait(["turbo"], 0.1)


def test_it_does_not_ring_for_what_it_would_leave_again(broker: Broker, submit: SubmitFn) -> None:
    """What stands behind a task of a higher priority is nothing it may take, and it waits at that very bell."""
    submit(model="turbo", priority="high"), submit(model="pico", priority="low")
    assert broker.wait(["pico"]) and broker.wait(["turbo"])
    assert take(broker, 4, ["pico"], busy=True) == []
    assert not broker.wait(["pico"], 0.1)
    assert broker.wait(["turbo"], 0.1)


def test_a_worker_that_is_full_rings_for_every_line(broker: Broker, submit: SubmitFn) -> None:
    high = submit(model="pico", priority="high")
    submit(model="turbo", priority="low"), submit(model="base", priority="low")
    assert broker.wait(["turbo"]) and broker.wait(["base"])
    assert take(broker, 1, ["pico"]) == [high]
    assert broker.wait(["turbo"], 0.1) and broker.wait(["base"], 0.1)


def test_a_worker_with_room_rings_for_no_model_that_it_has_emptied(broker: Broker, submit: SubmitFn) -> None:
    submit(model="pico"), submit(model="turbo")
    assert broker.wait(["pico"]) and broker.wait(["turbo"])
    assert len(take(broker, 4, ["pico"])) == 1
    assert not broker.wait(["pico"], 0.1)
    assert broker.wait(["turbo"], 0.1)


SMALL, LARGE = {"pico": 64 * 64}, {"width": 80}  # the most a small worker has memory for; what makes a task larger


def take_small(broker: Broker, room: int, *, worker: str = "w1", models: Sequence[str] = ("pico",)) -> list[str]:
    return [task.task_id for task in broker.claim(worker, "cpu", models, room, largest=SMALL).tasks]


def test_a_small_worker_leaves_what_it_has_no_memory_for(broker: Broker, submit: SubmitFn) -> None:
    large, small, other = submit(model="pico", **LARGE), submit(model="pico"), submit(model="turbo", **LARGE)
    assert take_small(broker, 4, models=("pico", "turbo")) == [small, other], "turbo has no limit"
    assert take_small(broker, 4) == []
    assert [task.task_id for task in broker.claim("w2", "cpu", ["pico"], 4).tasks] == [large]


def test_what_is_too_large_holds_up_no_lower_priority(broker: Broker, submit: SubmitFn) -> None:
    submit(model="pico", priority="high", **LARGE)
    low = submit(model="pico", priority="low")
    assert take_small(broker, 4) == [low]


@pytest.mark.parametrize(("ahead", "seen"), [(15, True), (16, False)])
def test_a_small_worker_looks_at_the_first_few_of_a_queue(
    broker: Broker, submit: SubmitFn, ahead: int, seen: bool
) -> None:
    for _ in range(ahead):
        submit(model="pico", **LARGE)
    small = submit(model="pico")
    assert take_small(broker, 4) == [small] * seen
    assert len(broker.claim("w2", "cpu", ["pico"], 99).tasks) == ahead + 1 - seen


def test_a_record_without_its_size_fits(broker: Broker, submit: SubmitFn, redis_server: RedisServer) -> None:
    old = submit(model="pico", **LARGE)
    redis_server.client.hdel(keys.TASK + old, "pixels")
    assert take_small(broker, 1) == [old]


def test_what_is_too_large_rings_for_another_and_is_named(broker: Broker, submit: SubmitFn) -> None:
    large = submit(model="pico", **LARGE)
    assert broker.wait(["pico"])
    claim = broker.claim("w1", "cpu", MODELS, 4, largest=SMALL)
    assert (claim.tasks, claim.left) == ([], ["pico"])
    assert broker.wait(["pico"], 0.1)
    assert [task.task_id for task in broker.claim("w2", "cpu", ["pico"], 4).tasks] == [large]
    assert broker.claim("w1", "cpu", MODELS, 4, largest=SMALL).left == []


def test_a_small_workers_claim_that_is_sent_again_gives_the_same_tasks(
    broker: Broker, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(model="pico", **LARGE)
    small = [submit(model="pico") for _ in range(2)]
    monkeypatch.setattr(secrets, "token_hex", lambda _: "same token")
    assert [take_small(broker, 1) for _ in range(2)] == [small[:1], small[:1]]


def test_tenants_share_a_small_worker_past_one_whose_tasks_are_too_large(broker: Broker, submit: SubmitFn) -> None:
    for _ in range(3):
        submit(model="pico", tenant="large", **LARGE)
    for _ in range(10):
        submit(model="pico", tenant="a"), submit(model="pico", tenant="b")
    served = [broker.claim("w1", "cpu", ["pico"], 1, largest=SMALL).tasks[0].queue for _ in range(8)]
    assert sorted(queue.rpartition(".")[2] for queue in served) == ["a"] * 4 + ["b"] * 4
    assert broker.claim("w2", "cpu", ["pico"], 1).tasks[0].queue.endswith(".large"), "it has its turn, as it had waited"
    for _ in range(10):
        submit(model="pico", tenant="new")
    late = [broker.claim("w1", "cpu", ["pico"], 1, largest=SMALL).tasks[0].queue for _ in range(9)]
    assert late.count("pico.normal.new") <= 4, "the clock did not go back: who comes now has no credit"


def test_a_small_worker_finds_who_stands_behind_many_whose_tasks_are_too_large(
    broker: Broker, submit: SubmitFn
) -> None:
    for k in range(100):
        submit(model="pico", tenant=f"large-{k}", **LARGE)
    fits = submit(model="pico", tenant="small")
    assert take_small(broker, 4) == [fits]


def test_only_what_fits_makes_a_model_wait_past_the_bound(broker: Broker, submit: SubmitFn, age: Age) -> None:
    large, fits, turbo = submit(model="pico", **LARGE), submit(model="pico"), submit(model="turbo")
    age(large, 60)
    claim = broker.claim("w1", "cpu", MODELS, 1, resident=["turbo"], bound_s=20.0, largest=SMALL)
    assert [task.task_id for task in claim.tasks] == [turbo]
    age(fits, 60)
    claim = broker.claim("w1", "cpu", MODELS, 1, resident=["turbo"], bound_s=20.0, largest=SMALL)
    assert [task.task_id for task in claim.tasks] == [fits]


def test_what_is_expired_or_forged_holds_no_small_worker_up(
    broker: Broker, submit: SubmitFn, redis_server: RedisServer
) -> None:
    submit(model="pico", **LARGE), submit(model="pico", deadline_s=0.001)
    redis_server.client.rpush(keys.RQ_QUEUE + "pico.normal.default", "forged")
    small = submit(model="pico")
    time.sleep(0.01)
    assert take_small(broker, 4) == [small]


def test_a_forged_job_holds_nothing_up(broker: Broker, submit: SubmitFn, redis_server: RedisServer) -> None:
    submit(model="turbo")
    redis_server.client.lpush(keys.RQ_QUEUE + "turbo.normal.default", "forged")
    pico = submit(model="pico")
    assert take(broker, 1, ["pico"]) == [pico]
    assert len(take(broker, 1, ["pico"])) == 1


def test_a_lower_priority_has_a_turn_after_ten_of_higher_ones_once_it_is_old(
    broker: Broker, submit: SubmitFn, age: Age, settings: Settings
) -> None:
    low = [submit(priority="low", model="pico") for _ in range(3)]
    for _ in range(60):
        submit(priority="high", model="pico")
    young = [broker.claim("w1", "cpu", ["pico"], 1).tasks[0].task_id for _ in range(15)]
    assert not set(young) & set(low), "it has not waited for long"
    for task_id in low:
        age(task_id, settings.ageing_s + 1)
    then = [broker.claim("w1", "cpu", ["pico"], 1).tasks[0].task_id for _ in range(33)]
    assert [then.index(task_id) for task_id in low] == [0, 11, 22]


def test_all_lower_priorities_have_their_turns(broker: Broker, submit: SubmitFn, age: Age) -> None:
    """Even together, on a worker of several models, and in one claim of many."""
    low, normal = submit(priority="low", model="turbo"), submit(priority="normal", model="base")
    for task_id in (low, normal):
        age(task_id, 1_000)
    high = [submit(priority="high", model="pico") for _ in range(30)]
    taken = take(broker, 32, MODELS)
    assert taken[:12] == [*high[:10], normal, low]
    assert taken[12:] == high[10:]


def test_who_is_due_by_age_needs_a_worker_that_may_take_it(broker: Broker, submit: SubmitFn, age: Age) -> None:
    low = submit(priority="low", model="pico", **LARGE)
    age(low, 1_000)
    high = [submit(priority="high", model="pico") for _ in range(24)]
    assert take_small(broker, 12) == high[:12], "it has no memory for it"
    assert take(broker, 1, ["pico"]) == [low]
    assert take(broker, 11, ["pico"]) == high[12:23]


def test_a_lower_priority_that_is_served_has_no_turn_to_claim(broker: Broker, submit: SubmitFn, age: Age) -> None:
    for _ in range(2):
        age(submit(priority="low", model="pico"), 1_000)
    for _ in range(9):
        submit(priority="high", model="pico")
    assert len(take(broker, 10, ["pico"])) == 10, "the last of them is low"
    for _ in range(12):
        submit(priority="high", model="pico")
    queues = [task.queue for task in broker.claim("w1", "cpu", ["pico"], 12).tasks]
    assert queues == ["pico.high.default"] * 10 + ["pico.low.default"] + ["pico.high.default"]


def test_a_drained_slot_claims_nothing_and_leaves_the_bell_to_others(broker: Broker, submit: SubmitFn) -> None:
    broker.drain("host.gpu0.abc")
    task_id = submit()
    broker.wait(["simulated"])  # as one that was waiting when it was drained
    for name in ("host.gpu0.abc", "host.gpu0.def"):
        claim = broker.claim(name, "gpu", ["simulated"], 1)
        assert (claim.tasks, claim.suspended) == ([], True)
    assert broker.wait(["simulated"], 0.1), "rung again"
    (other,) = broker.claim("host.gpu1.abc", "gpu", ["simulated"], 1).tasks
    assert other.task_id == task_id
    assert not broker.claim("host.gpu0.abc", "gpu", ["simulated"], 1).tasks
    assert not broker.wait(["simulated"], 0.1), "for nothing that waits"
    broker.undrain("host.gpu0.def")
    submit()
    assert broker.claim("host.gpu0.abc", "gpu", ["simulated"], 1).tasks
