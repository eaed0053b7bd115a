"""Deliveries on Redis: lined up with the task's own transitions, taken, settled, and never lost."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, FinishedJobRegistry, ScheduledJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

from common import keys, records
from common.broker import Broker
from common.outbox import TRIES
from common.records import Errand, Hold
from common.schemas import Delivery, TaskStatus
from common.settings import Settings
from tests.conftest import SubmitFn
from tests.fleet import record
from tests.servers import RedisServer, eventually

URL = "https://hooks.example/told?token=s3cret"
ENDED = {"url": URL, "events": ["ended"]}
BOTH = {"url": URL, "events": ["started", "ended"]}


def run(broker: Broker, worker: str = "w1") -> Hold:
    """Claim one task and return the hold on it."""
    (task,) = broker.claim(worker, "cpu", ["simulated"], 1).tasks
    return Hold(task.task_id, task.fence)


def end(broker: Broker, status: str = "succeeded") -> None:
    broker.finish("w1", run(broker), status)  # type: ignore[arg-type]


def take(broker: Broker, courier: str = "c1", room: int = 10, most: int = 10, **options: float) -> list[Errand]:
    return list(broker.take_deliveries(courier, room, {}, most=most, **{"lease_s": 30.0, **options}).taken)


def deliveries(broker: Broker, task_id: str) -> list[Delivery]:
    return list(record(broker, task_id).deliveries)


def queue_of(redis: Redis, tenant: str = "default") -> Queue:
    return Queue(f"webhooks.{tenant}", connection=redis, serializer=JSONSerializer)


@pytest.fixture
def redis(redis_url: str) -> Redis:
    return Redis.from_url(redis_url)


def test_a_task_without_a_webhook_lines_nothing_up(broker: Broker, submit: SubmitFn, redis: Redis) -> None:
    task_id = submit()
    end(broker)
    assert deliveries(broker, task_id) == []
    assert not take(broker)
    assert not redis.exists("zf:deliveries")


@pytest.mark.parametrize("events", [["ended"], ["started", "ended"], ["started"]], ids="+".join)
def test_what_was_asked_for_is_lined_up_with_the_tasks_own_transitions(
    broker: Broker, submit: SubmitFn, events: list[str]
) -> None:
    task_id = submit(webhook={"url": URL, "events": events})
    assert not take(broker)
    end(broker)
    assert [delivery.event for delivery in deliveries(broker, task_id)] == events
    names = {"started": f"{task_id}-started-1", "ended": f"{task_id}-ended"}
    assert [(errand.delivery_id, errand.event, errand.tries) for errand in take(broker)] == [
        (names[event], event, 1) for event in events
    ]


@pytest.mark.parametrize("way", ["cancel", "cancel_running", "expire", "expire_by_view", "quarantine", "unclaimable"])
def test_every_way_to_end_is_told(broker: Broker, submit: SubmitFn, settings: Settings, way: str, redis: Redis) -> None:
    task_id = submit(webhook=ENDED, **({"deadline_s": 0.05} if way.startswith("expire") else {}))
    if way == "cancel":
        broker.cancel(task_id, "default")
    elif way == "cancel_running":
        hold = run(broker)
        broker.cancel(task_id, "default")
        broker.release("w1", hold)
    elif way.startswith("expire"):
        time.sleep(0.06)
        assert way == "expire_by_view" or broker.expire() == [(task_id, "")]
    elif way == "quarantine":
        for _ in range(settings.crash_limit):
            run(broker)
            broker.reap("w1", [task_id])
            redis.delete("zf:dead:w1")
    else:
        redis.hset(f"zf:task:{task_id}", "request", '{"webhook": {"url": "https://x.example", "events": ["ended"]}}')
        assert not broker.claim("w1", "cpu", ["simulated"], 1).tasks
        assert [errand.task_id for errand in take(broker)] == [task_id]
        return
    assert record(broker, task_id).status.final
    assert [errand.task_id for errand in take(broker)] == [task_id]


def test_each_attempt_is_told_and_the_end_once(broker: Broker, submit: SubmitFn) -> None:
    task_id = submit(webhook=BOTH)
    broker.release("w1", run(broker))
    hold = run(broker)
    assert broker.finish("w1", hold, "succeeded") == "ok"
    assert broker.finish("w1", hold, "succeeded") == "already"
    assert [delivery.id.removeprefix(task_id) for delivery in deliveries(broker, task_id)] == [
        "-started-1", "-started-2", "-ended",
    ]  # fmt: skip
    assert len(take(broker)) == 3


def test_deliveries_of_one_millisecond_are_in_their_order() -> None:
    told = json.dumps({"event": "started", "state": "pending", "tries": 0, "fence": 0, "made_at": 1})
    names = ["ended", "started-10", "started-2", "started-1"]
    found = records.deliveries({"id": "x", "webhook": "{}"} | {f"delivery:{name}": told for name in names})
    assert [each.id for each in found] == ["x-started-1", "x-started-2", "x-started-10", "x-ended"]


def test_a_delivery_is_one_couriers_at_a_time(broker: Broker, submit: SubmitFn) -> None:
    for _ in range(20):
        submit(webhook=ENDED)
        end(broker)
    first, second = take(broker, "c1", 7), take(broker, "c2", 30, 30)
    assert (len(first), len(second)) == (7, 13)
    assert {errand.delivery_id for errand in first}.isdisjoint(errand.delivery_id for errand in second)
    assert broker.settle_delivery("c2", first[0], "delivered") == "lost"
    assert broker.settle_delivery("c1", first[0]._replace(fence=2), "delivered") == "lost"
    assert broker.settle_delivery("c1", first[0], "delivered", status=204) == "ok"
    assert broker.settle_delivery("c1", first[0], "delivered", status=204) == "lost"
    (delivery,) = deliveries(broker, first[0].task_id)
    assert (delivery.state, delivery.tries, delivery.last_status) == ("delivered", 1, 204)
    assert delivery.next_try_at is None and delivery.last_try_at is not None


def test_a_take_whose_answer_was_lost_gives_the_same_again(
    broker: Broker, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(4):
        submit(webhook=ENDED)
        end(broker)
    monkeypatch.setattr("common.outbox.secrets.token_hex", lambda _: "the same")
    first = take(broker, room=3)
    assert take(broker, room=3) == first
    broker.settle_delivery("c1", first[0], "delivered")
    assert take(broker, room=3) == first[1:]


def test_a_silent_couriers_deliveries_are_taken_again_and_its_late_word_counts_for_nothing(
    broker: Broker, submit: SubmitFn
) -> None:
    task_id = submit(webhook=ENDED)
    end(broker)
    (lost,) = take(broker, "c1", lease_s=0.4)
    assert not take(broker, "c2")
    time.sleep(0.41)
    (again,) = take(broker, "c2")
    assert (again.delivery_id, again.tries, again.fence) == (lost.delivery_id, 2, 2)
    assert broker.settle_delivery("c1", lost, "failed") == "lost"
    assert broker.settle_delivery("c2", again, "delivered", status=200) == "ok"
    assert deliveries(broker, task_id)[0].state == "delivered"


def test_a_delivery_that_every_courier_falls_silent_over_fails_in_the_end(broker: Broker, submit: SubmitFn) -> None:
    task_id = submit(webhook=ENDED)
    end(broker)
    for _ in range(TRIES):
        assert len(take(broker, lease_s=0.002)) == 1
        time.sleep(0.005)
    assert not take(broker)
    (delivery,) = deliveries(broker, task_id)
    assert (delivery.state, delivery.tries) == ("failed", TRIES)
    assert "silent" in (delivery.last_error or "")


def test_what_is_given_back_was_no_try(broker: Broker, submit: SubmitFn) -> None:
    task_id = submit(webhook=ENDED)
    end(broker)
    (errand,) = take(broker)
    assert broker.settle_delivery("c1", errand, "back") == "ok"
    assert deliveries(broker, task_id)[0].tries == 0
    assert [(again.delivery_id, again.tries) for again in take(broker, "c2")] == [(errand.delivery_id, 1)]


def test_a_failed_try_waits_for_its_pause(broker: Broker, submit: SubmitFn) -> None:
    task_id = submit(webhook=ENDED)
    end(broker)
    (errand,) = take(broker)
    broker.settle_delivery("c1", errand, "again", status=500, error="the receiver answered 500", pause_s=0.3)
    (delivery,) = deliveries(broker, task_id)
    assert (delivery.state, delivery.last_status, delivery.last_error) == ("pending", 500, "the receiver answered 500")
    assert delivery.next_try_at is not None and delivery.last_try_at is not None
    assert 0.29 <= (delivery.next_try_at - delivery.last_try_at).total_seconds() < 0.5
    assert not take(broker)
    time.sleep(0.31)
    assert [errand.tries for errand in take(broker)] == [2]


def test_tenants_take_turns_and_none_has_more_than_its_part(broker: Broker, submit: SubmitFn) -> None:
    for tenant, count in (("many", 30), ("few", 3), ("one", 1)):
        for _ in range(count):
            submit(tenant=tenant, webhook=ENDED)
            end(broker)
    first = broker.take_deliveries("c1", 5, {}, most=4, lease_s=30.0)
    assert sorted(errand.tenant for errand in first.taken) == ["few", "few", "many", "many", "one"]
    assert first.left
    held = {"many": 2, "few": 2, "one": 1}
    second = broker.take_deliveries("c1", 20, held, most=4, lease_s=30.0)
    assert sorted(errand.tenant for errand in second.taken) == ["few", "many", "many"]
    third = broker.take_deliveries("c1", 20, {"many": 4, "few": 3, "one": 1}, most=4, lease_s=30.0)
    assert third.taken == [] and third.left
    submit(tenant="newcomer", webhook=ENDED)
    end(broker)
    fourth = broker.take_deliveries("c1", 20, {"many": 4}, most=4, lease_s=30.0)
    assert [errand.tenant for errand in fourth.taken] == ["newcomer"]


def test_rqs_own_classes_read_every_state(broker: Broker, submit: SubmitFn, redis: Redis) -> None:
    outcomes = ["delivered", "failed", "again", "under way", "queued"]
    ids = []
    for _ in outcomes:
        ids.append(submit(webhook=ENDED) + "-ended")
        end(broker)
    queue = queue_of(redis)
    assert queue in Queue.all(connection=redis, serializer=JSONSerializer)
    assert queue.job_ids == ids
    for errand, outcome in zip(take(broker, room=4), outcomes, strict=False):
        if outcome != "under way":
            broker.settle_delivery("c1", errand, outcome, status=500, error="e", pause_s=60)  # type: ignore[arg-type]
    options = {"queue": queue}
    assert FinishedJobRegistry(**options).get_job_ids() == [ids[0]]
    assert FailedJobRegistry(**options).get_job_ids() == [ids[1]]
    scheduled = ScheduledJobRegistry(**options)
    assert scheduled.get_job_ids() == [ids[2]]
    assert 55 < scheduled.get_scheduled_time(ids[2]).timestamp() - time.time() < 65
    assert StartedJobRegistry(**options).get_job_ids() == [ids[3]]
    assert queue.job_ids == [ids[4]]
    states = [JobStatus.FINISHED, JobStatus.FAILED, JobStatus.SCHEDULED, JobStatus.STARTED, JobStatus.QUEUED]
    jobs = [Job.fetch(i, connection=redis, serializer=JSONSerializer) for i in ids]
    assert [job.get_status() for job in jobs] == states
    assert [job.args for job in jobs] == [[i] for i in ids]
    assert (jobs[0].func_name, jobs[0].timeout) == ("zfleet.webhook", -1)
    StartedJobRegistry(**options).cleanup()
    assert StartedJobRegistry(**options).get_job_ids() == [ids[3]]


def test_rqs_hashes_hold_nothing_of_the_url(broker: Broker, submit: SubmitFn, redis: Redis) -> None:
    submit(webhook=BOTH)
    end(broker, "failed")
    for errand in take(broker):
        broker.settle_delivery("c1", errand, "failed", error="no")
    for key in redis.scan_iter("rq:*"):
        text = redis.hgetall(key) if redis.type(key) == b"hash" else redis.dump(key)
        assert b"hooks.example" not in repr(text).encode() and b"s3cret" not in repr(text).encode()


def test_rq_empty_loses_no_delivery(broker: Broker, submit: SubmitFn, redis: Redis) -> None:
    ids = []
    for _ in range(3):
        ids.append(submit(webhook=ENDED) + "-ended")
        end(broker)
    (under_way,) = take(broker, room=1)
    assert queue_of(redis).empty() == 2
    assert not take(broker)
    assert sorted(stray.delivery_id for stray in broker.mend_deliveries()) == sorted(ids[1:])
    assert broker.mend_deliveries() == []
    assert sorted(queue_of(redis).job_ids) == sorted(ids[1:])
    assert Job.fetch(ids[1], connection=redis, serializer=JSONSerializer).args == [ids[1]]
    assert {errand.delivery_id for errand in take(broker)} == set(ids[1:])
    assert broker.settle_delivery("c1", under_way, "delivered") == "ok"


def test_a_look_for_lost_ones_is_made_once_in_a_while(broker: Broker, submit: SubmitFn, redis: Redis) -> None:
    submit(webhook=ENDED)
    end(broker)
    assert broker.mend_deliveries(every_s=60) == []
    queue_of(redis).empty()
    assert broker.mend_deliveries(every_s=60) == []
    assert len(broker.mend_deliveries()) == 1


def test_a_line_from_which_none_is_lost_is_not_read_through(broker: Broker, submit: SubmitFn, redis: Redis) -> None:
    for tenant in ("default", "acme"):
        submit(webhook=ENDED, tenant=tenant)
        end(broker)
    take(broker, room=1)
    redis.config_resetstat()
    assert broker.mend_deliveries() == []
    assert {"cmdstat_lrange", "cmdstat_hmget"}.isdisjoint(redis.info("commandstats"))
    redis.delete(keys.TO_DELIVER)  # with it nobody would ever be told
    assert broker.mend_deliveries() == []
    assert len(take(broker)) == 1


def test_one_that_is_lost_is_found_once_what_stands_in_its_place_is_gone(
    broker: Broker, submit: SubmitFn, redis: Redis
) -> None:
    task_id = submit(webhook=ENDED)
    end(broker)
    queue_of(redis).empty()
    redis.lpush("rq:queue:webhooks.default", "forged")
    assert broker.mend_deliveries() == []
    assert not take(broker)
    assert broker.mend_deliveries() == [(f"{task_id}-ended", task_id, "")]


def test_a_job_that_stands_for_no_delivery_is_refused(broker: Broker, submit: SubmitFn, redis: Redis) -> None:
    task_id = submit(webhook=ENDED)
    end(broker)
    forged = ["../x", "os.system", f"{task_id}-started-7", "nobody-ended", f"{task_id}"]
    redis.lpush("rq:queue:webhooks.default", *forged)
    assert [errand.delivery_id for errand in take(broker)] == [f"{task_id}-ended"]
    assert {i.decode() for i in redis.zrange("rq:failed:webhooks.default", 0, -1)} == set(forged)


def test_a_delivery_that_stands_in_line_twice_is_told_once(broker: Broker, submit: SubmitFn, redis: Redis) -> None:
    task_id = submit(webhook=ENDED)
    end(broker)
    redis.lpush("rq:queue:webhooks.default", f"{task_id}-ended")
    (errand,) = take(broker)
    broker.settle_delivery("c1", errand, "delivered")
    assert not take(broker)
    assert redis.llen("rq:queue:webhooks.default") == 0


def test_deliveries_go_with_their_task(settings: Settings, redis: Redis) -> None:
    brief = Broker(settings.model_copy(update={"retention_days": 0.3 / 86_400}))
    from tests.fleet import submit_many

    (task_id,) = submit_many(brief, 1, webhook=ENDED)
    brief.cancel(task_id, None)
    (errand,) = take(brief)
    brief.settle_delivery("c1", errand, "again", pause_s=0.7)
    eventually(lambda: not redis.exists(f"zf:task:{task_id}"))
    time.sleep(0.2)
    assert not take(brief)
    assert redis.zcard("zf:deliveries") == redis.zcard("rq:scheduled:webhooks.default") == 0
    assert not redis.exists(f"rq:job:{task_id}-ended")
    brief.close()


def test_the_queues_of_webhooks_are_not_listed_among_the_tasks(broker: Broker, submit: SubmitFn) -> None:
    for tenant in ("high", "acme"):
        submit(tenant=tenant, webhook=ENDED)
        end(broker)
    assert [queue.name for queue in broker.queues()] == ["simulated.normal.acme", "simulated.normal.high"]


def test_the_bell_rings_for_a_courier(broker: Broker, submit: SubmitFn) -> None:
    assert not broker.wait_for_deliveries(0.05)
    submit(webhook=ENDED)
    end(broker)
    assert broker.wait_for_deliveries(0.05)


def test_a_status_without_a_webhook_costs_no_more(broker: Broker, submit: SubmitFn, redis: Redis) -> None:
    def calls(task_id: str) -> int:
        before = redis.info("stats")["total_commands_processed"]
        broker.view(task_id)
        return int(redis.info("stats")["total_commands_processed"] - before)

    plain, hooked = submit(), submit(webhook=BOTH)
    end(broker)
    end(broker)
    calls(plain)
    assert calls(plain) == calls(hooked)


def test_a_secret_is_one_tenants_and_its_predecessor_is_good_for_a_day(broker: Broker, redis: Redis) -> None:
    first = broker.webhook_secrets("acme")
    assert first == broker.webhook_secrets("acme") and len(first.current) == 32 and first.previous is None
    assert first.current != broker.webhook_secrets("other").current
    assert first.current == broker.shared_secret("webhook:acme")
    second = broker.rotate_webhook_secret("acme")
    assert (second.previous, second.current != first.current) == (first.current, True)
    assert second.previous_until is not None
    assert 86_000 < second.previous_until.timestamp() - time.time() < 87_000
    assert broker.rotate_webhook_secret("acme").previous == second.current
    redis.hset("zf:secrets", "webhook:acme:before", f"{first.current.hex()} 1000")
    assert broker.webhook_secrets("acme").previous is None


@pytest.fixture
def own_redis(tmp_path: Path) -> RedisServer:
    (tmp_path / "redis").mkdir()
    return RedisServer(tmp_path / "redis")


def test_a_forgotten_end_is_lined_up_again_under_the_same_id(settings: Settings, own_redis: RedisServer) -> None:
    from tests.fleet import submit_many

    with own_redis:
        there = settings.model_copy(update={"redis_url": own_redis.url})
        broker, other = Broker(there, patience_s=20.0), Broker(there, patience_s=20.0)
        task_id, queued = submit_many(broker, 2, webhook=BOTH)
        before = own_redis.written()
        end(broker)
        broker.cancel(queued, None)
        told = take(other)
        other.settle_delivery("c1", told[0], "delivered")
        own_redis.kill()
        own_redis.forget(before)
        own_redis.start()
        assert record(broker, task_id).status is TaskStatus.SUCCEEDED
        assert record(broker, queued).status is TaskStatus.CANCELED
        again = take(other)
        assert sorted(errand.delivery_id for errand in again) == sorted(errand.delivery_id for errand in told)
        assert {delivery.state for delivery in deliveries(broker, task_id)} == {"pending"}
        broker.close()
        other.close()


def test_the_record_is_readable_json(broker: Broker, submit: SubmitFn, redis: Redis) -> None:
    task_id = submit(webhook=ENDED)
    end(broker)
    stored = json.loads(redis.hget(f"zf:task:{task_id}", "delivery:ended") or b"")
    assert stored["made_at"] == int(record(broker, task_id).finished_at.timestamp() * 1000)  # type: ignore[union-attr]
