"""Every transition of a task's life, on a real Redis."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable

import pytest
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

from common import keys
from common.broker import Broker
from common.cards import WorkerCard
from common.errors import IdempotencyConflict, QueueFull
from common.records import Claimed, Hold, NewTask
from common.schemas import ImageRef, StageTimings, TaskError, TaskStatus
from common.settings import Settings
from tests.conftest import SubmitFn, resolved
from tests.servers import RedisServer

QUEUE = "simulated.normal.default"


def claim_one(broker: Broker, worker: str = "w1") -> Claimed:
    (task,) = broker.claim(worker, "cpu", ["simulated"], 1).tasks
    return task


def hold(task: Claimed) -> Hold:
    return Hold(task.task_id, task.fence)


def status(broker: Broker, task_id: str) -> TaskStatus:
    record = broker.view(task_id)
    assert record is not None
    return record.status


def test_a_task_goes_from_submit_to_succeeded(broker: Broker, submit: SubmitFn) -> None:
    task_id = submit()
    task = claim_one(broker)
    assert (task.task_id, task.fence, task.queue) == (task_id, 1, QUEUE)
    assert task.request == resolved()
    assert broker.progress("w1", {hold(task): (2, 4)}) == ["ok"]
    image = ImageRef(key="a/0.png", width=64, height=64, format="png", bytes=9, sha256="0" * 64, seed=1)
    stages = StageTimings(denoise_ms=40.0)
    outcome = broker.finish("w1", hold(task), "succeeded", images=[image], warnings=["cut"], stages=stages, busy_ms=50)
    assert outcome == "ok"
    record = broker.view(task_id)
    assert record is not None
    assert record.status is TaskStatus.SUCCEEDED
    assert (record.step, record.images, record.warnings, record.stages) == (4, [image], ["cut"], stages)
    assert [attempt.outcome for attempt in record.attempts] == ["succeeded"]
    assert record.finished_at and record.started_at and record.expires_at
    assert record.created_at <= record.started_at <= record.finished_at < record.expires_at
    assert broker.pending() == 0


def test_a_record_survives_every_character(broker: Broker) -> None:
    prompt = '左边红色 "quote" \\ \t newline\n ]==] é 🎨'
    task_id = secrets.token_hex(16)
    request = resolved(prompt=prompt, metadata={"客户": "]==]"})
    broker.submit(NewTask(task_id=task_id, tenant="default", request=request))
    assert claim_one(broker).request == request


def test_the_same_id_twice_is_one_task(broker: Broker, settings: Settings) -> None:
    task = NewTask(task_id=secrets.token_hex(16), tenant="default", request=resolved())
    assert broker.submit(task).created
    assert not broker.submit(task).created
    assert broker.queues()[0].queued == 1


def test_an_idempotency_key_makes_one_task_and_refuses_another_body(broker: Broker) -> None:
    def attempt(body: str, key: str = "k1", tenant: str = "default") -> str:
        task = NewTask(
            task_id=secrets.token_hex(16), tenant=tenant, request=resolved(), idempotency_key=key, body_hash=body
        )
        return broker.submit(task).task_id

    first = attempt("a")
    assert attempt("a") == first
    assert attempt("a", key="k2") != first
    assert attempt("a", tenant="other") != first
    with pytest.raises(IdempotencyConflict):
        attempt("b")


def test_a_full_queue_refuses_and_keeps_what_it_has(settings: Settings) -> None:
    small = Broker(settings.model_copy(update={"queue_cap": 2}))
    for _ in range(2):
        small.submit(NewTask(task_id=secrets.token_hex(16), tenant="default", request=resolved()))
    with pytest.raises(QueueFull):
        small.submit(NewTask(task_id="refused", tenant="default", request=resolved()))
    assert small.view("refused") is None
    assert small.pending() == 2


def test_claims_go_by_priority_then_first_come(broker: Broker, submit: SubmitFn) -> None:
    low, normal1, normal2, high = (submit(priority=p) for p in ("low", "normal", "normal", "high"))
    claimed = broker.claim("w1", "cpu", ["simulated"], 4).tasks
    assert [task.task_id for task in claimed] == [high, normal1, normal2, low]


def test_tenants_share_whatever_their_backlogs(broker: Broker, submit: SubmitFn) -> None:
    for _ in range(50):
        submit(tenant="big")
    submit(tenant="small")
    served = [broker.claim("w1", "cpu", ["simulated"], 1).tasks[0].queue for _ in range(2)]
    assert sorted(queue.rpartition(".")[2] for queue in served) == ["big", "small"]


def test_a_tenant_that_asks_for_more_per_task_gets_fewer_tasks(broker: Broker, submit: SubmitFn) -> None:
    for _ in range(40):
        submit(tenant="heavy", steps=9)
        submit(tenant="light", steps=3)
    served = [broker.claim("w1", "cpu", ["simulated"], 1).tasks[0].queue.rpartition(".")[2] for _ in range(40)]
    assert served.count("light") == pytest.approx(30, abs=2)


def test_a_claim_counts_pictures_not_tasks(broker: Broker, submit: SubmitFn) -> None:
    for _ in range(3):
        submit(n=2)
    assert len(broker.claim("w1", "cpu", ["simulated"], 4).tasks) == 2


def test_a_worker_gets_only_its_models(broker: Broker, submit: SubmitFn) -> None:
    submit(model="turbo")
    assert not broker.claim("w1", "cpu", ["simulated"], 4).tasks
    assert len(broker.claim("w1", "cpu", ["pico", "turbo"], 4).tasks) == 1


def test_a_claim_whose_reply_was_lost_gives_the_same_tasks_again(
    broker: Broker, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(), submit()
    monkeypatch.setattr(secrets, "token_hex", lambda _: "same token")
    first = broker.claim("w1", "cpu", ["simulated"], 1).tasks
    again = broker.claim("w1", "cpu", ["simulated"], 1).tasks
    assert [hold(task) for task in first] == [hold(task) for task in again]
    assert broker.queues()[0].queued == 1


def test_a_record_that_cannot_be_read_fails_alone(broker: Broker, submit: SubmitFn, redis_server: RedisServer) -> None:
    broken, whole = submit(), submit()
    redis_server.client.hset(keys.TASK + broken, "request", '{"prompt": 7}')
    tasks = broker.claim("w1", "cpu", ["simulated"], 9).tasks
    assert [task.task_id for task in tasks] == [whole]
    assert redis_server.client.hget(keys.TASK + broken, "status") == "failed"
    assert broker.queues()[0].running == 1


def test_what_a_newer_version_adds_is_ignored(broker: Broker, submit: SubmitFn, redis_server: RedisServer) -> None:
    task_id = submit()
    request = {**resolved().model_dump(), "invented_later": 1}
    redis_server.client.hset(keys.TASK + task_id, "request", json.dumps(request))
    assert claim_one(broker).request == resolved()


def test_a_cancel_that_is_sent_twice_is_one(broker: Broker, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch) -> None:
    task_id = submit()
    monkeypatch.setattr(secrets, "token_hex", lambda _: "same token")
    assert [broker.cancel(task_id, "default") for _ in range(2)] == ["canceled", "canceled"]


def test_an_idempotency_key_whose_task_is_gone_makes_a_new_one(broker: Broker, redis_server: RedisServer) -> None:
    def send() -> str:
        task_id = secrets.token_hex(16)
        task = NewTask(task_id=task_id, tenant="default", request=resolved(), idempotency_key="k", body_hash="b")
        return broker.submit(task).task_id

    first = send()
    assert send() == first
    redis_server.client.delete(keys.TASK + first)
    assert send() != first


def test_sixteen_workers_never_share_a_task(broker: Broker, submit: SubmitFn) -> None:
    ids = {submit() for _ in range(64)}
    taken: list[str] = []

    def work(name: str) -> None:
        while tasks := broker.claim(name, "cpu", ["simulated"], 2).tasks:
            taken.extend(task.task_id for task in tasks)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 64
    assert set(taken) == ids


def test_a_suspended_fleet_claims_nothing(broker: Broker, submit: SubmitFn, redis_server: RedisServer) -> None:
    from rq.suspension import resume, suspend

    submit()
    suspend(redis_server.client)
    claim = broker.claim("w1", "cpu", ["simulated"], 1)
    assert (claim.tasks, claim.suspended) == ([], True)
    resume(redis_server.client)
    assert broker.claim("w1", "cpu", ["simulated"], 1).tasks


def test_the_bell_wakes_a_waiting_worker_and_rings_on_while_tasks_are_left(broker: Broker, submit: SubmitFn) -> None:
    assert not broker.wait(["simulated"])
    submit(), submit()
    assert broker.wait(["simulated"])
    claim_one(broker)
    assert broker.wait(["simulated"])
    claim_one(broker, "w2")
    assert not broker.wait(["simulated"])


def test_finish_is_first_writer_wins(broker: Broker, submit: SubmitFn) -> None:
    task_id = submit()
    task = claim_one(broker)
    assert broker.finish("w1", hold(task), "succeeded") == "ok"
    assert broker.finish("w1", hold(task), "succeeded") == "already"
    assert broker.finish("w1", hold(task), "failed") == "lost"
    assert broker.finish("w2", hold(task), "succeeded") == "lost"
    assert status(broker, task_id) is TaskStatus.SUCCEEDED


def test_a_late_finish_of_an_older_attempt_is_refused(broker: Broker, submit: SubmitFn) -> None:
    task_id = submit()
    old = claim_one(broker)
    broker.reap("w1")
    new = claim_one(broker, "w2")
    assert new.fence == 2
    assert broker.finish("w1", hold(old), "succeeded") == "lost"
    assert broker.progress("w1", {hold(old): (1, 4)}) == ["lost"]
    assert broker.release("w1", hold(old)) == "lost"
    assert status(broker, task_id) is TaskStatus.RUNNING
    assert broker.finish("w2", hold(new), "succeeded") == "ok"


def test_a_failure_carries_its_reason(broker: Broker, submit: SubmitFn) -> None:
    task_id = submit()
    error = TaskError(code="pipeline_failed", message="no 画", retryable=False)
    broker.finish("w1", hold(claim_one(broker)), "failed", error=error)
    record = broker.view(task_id)
    assert record is not None
    assert (record.status, record.error) == (TaskStatus.FAILED, error)


def test_release_puts_a_task_at_the_head_and_blames_nobody(broker: Broker, submit: SubmitFn) -> None:
    first, second = submit(), submit()
    task = claim_one(broker)
    assert broker.release("w1", hold(task)) == "ok"
    record = broker.view(first)
    assert record is not None
    assert (record.status, record.position) == (TaskStatus.QUEUED, 0)
    assert [attempt.outcome for attempt in record.attempts] == ["released"]
    for _ in range(5):
        again = claim_one(broker)
        assert again.task_id == first
        broker.release("w1", hold(again))
    assert status(broker, second) is TaskStatus.QUEUED


def test_cancel_of_a_queued_task_is_at_once(broker: Broker, submit: SubmitFn) -> None:
    task_id = submit()
    assert broker.cancel(task_id, "somebody else") == "unknown"
    assert broker.cancel("no such id", "default") == "unknown"
    assert broker.cancel(task_id, "default") == "canceled"
    assert broker.cancel(task_id, "default") == "final"
    assert status(broker, task_id) is TaskStatus.CANCELED
    assert not broker.claim("w1", "cpu", ["simulated"], 1).tasks


def test_cancel_of_a_running_task_flags_it(broker: Broker, submit: SubmitFn, card: Callable[[str], WorkerCard]) -> None:
    task_id = submit()
    task = claim_one(broker)
    assert broker.cancel(task_id, "default") == "flagged"
    assert broker.progress("w1", {hold(task): (1, 4)}) == ["cancel"]
    assert broker.beat(card("w1"), [hold(task)], 30)[1] == ["cancel"]
    assert broker.finish("w1", hold(task), "canceled") == "ok"
    assert status(broker, task_id) is TaskStatus.CANCELED


def test_a_canceled_task_is_not_run_again_after_a_crash_or_a_release(broker: Broker, submit: SubmitFn) -> None:
    crashed, released = submit(), submit()
    claim_one(broker, "dead")
    task = claim_one(broker, "w1")
    for task_id in (crashed, released):
        broker.cancel(task_id, "default")
    assert [reaped.outcome for reaped in broker.reap("dead")] == ["canceled"]
    assert broker.release("w1", hold(task)) == "canceled"
    assert status(broker, crashed) is status(broker, released) is TaskStatus.CANCELED


def test_a_beat_keeps_the_lease_and_a_missed_one_loses_it(
    settings: Settings, submit: SubmitFn, card: Callable[[str], WorkerCard]
) -> None:
    broker = Broker(settings.model_copy(update={"lease_s": 0.8}))
    submit()
    task = claim_one(broker)
    for _ in range(2):
        threading.Event().wait(0.5)
        assert broker.beat(card("w1"), [hold(task)], 30)[1] == ["ok"]
        assert broker.reap() == []
    threading.Event().wait(0.9)
    (reaped,) = broker.reap()
    assert (reaped.task_id, reaped.outcome, reaped.worker) == (task.task_id, "requeued", "w1")
    assert broker.reap() == []
    assert broker.beat(card("w1"), [hold(task)], 30)[1] == ["lost"]


def test_the_third_crash_quarantines(broker: Broker, submit: SubmitFn) -> None:
    task_id = submit()
    outcomes = []
    for worker in ("w1", "w2", "w3"):
        claim_one(broker, worker)
        outcomes += [reaped.outcome for reaped in broker.reap(worker, [task_id])]
    assert outcomes == ["requeued", "requeued", "quarantined"]
    record = broker.view(task_id)
    assert record is not None
    assert record.error is not None
    assert (record.status, record.error.code) == (TaskStatus.FAILED, "worker_crashed")
    assert [attempt.outcome for attempt in record.attempts] == ["crashed"] * 3


def test_a_crash_is_counted_for_those_on_the_device_alone(broker: Broker, submit: SubmitFn) -> None:
    suspect, waiting = submit(), submit()
    for worker in ("w1", "w2", "w3", "w4", "w5"):
        broker.claim(worker, "cpu", ["simulated"], 2)
        assert {(reaped.task_id, reaped.outcome) for reaped in broker.reap(worker)} == {
            (suspect, "given_back"),
            (waiting, "given_back"),
        }
    stood_by = submit()
    broker.claim("w6", "cpu", ["simulated"], 3)
    broker.reap("w6", [suspect], [stood_by])
    again = {task.task_id: task.alone for task in broker.claim("w7", "cpu", ["simulated"], 3).tasks}
    assert again == {suspect: True, waiting: False, stood_by: True}
    assert [broker.view(task_id).attempts[-2].outcome for task_id in (suspect, waiting)] == ["crashed", "released"]  # type: ignore[union-attr]
    record = broker.view(waiting)
    assert record is not None
    assert {attempt.outcome for attempt in record.attempts[:-1]} == {"released"}


def test_after_an_outage_leases_get_one_more_term(
    settings: Settings, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever finds the gap, and however late what it sent is heard: nobody could beat meanwhile."""
    monkeypatch.setattr("common.broker.REAP_GAP_S", 1.0)
    broker = Broker(settings.model_copy(update={"lease_s": 0.6}))
    assert broker.reap() == []
    task_id = submit()
    claim_one(broker)
    threading.Event().wait(1.1)  # Redis hangs: no reap, no beat
    assert broker.reap() == []
    threading.Event().wait(0.2)
    assert broker.reap() == []
    threading.Event().wait(0.45)
    assert [reaped.task_id for reaped in broker.reap()] == [task_id]


def test_a_claim_that_is_heard_after_its_workers_burial_takes_nothing(broker: Broker, submit: SubmitFn) -> None:
    submit()
    broker.reap("w1")
    assert not broker.claim("w1", "cpu", ["simulated"], 1).tasks
    assert broker.claim("w2", "cpu", ["simulated"], 1).tasks


def test_a_fleet_that_is_closed_finds_what_it_accepted_and_takes_nothing_new(broker: Broker) -> None:
    def task(task_id: str, key: str) -> NewTask:
        return NewTask(task_id=task_id, tenant="default", request=resolved(), idempotency_key=key, body_hash="b")

    accepted = broker.submit(task("a" * 32, "k1"))
    assert broker.submit(task("b" * 32, "k1"), closed=True).task_id == accepted.task_id
    with pytest.raises(QueueFull):
        broker.submit(task("c" * 32, "k2"), closed=True)


def test_a_canceled_run_whose_lease_was_forgotten_is_not_put_back(
    broker: Broker, submit: SubmitFn, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.broker.RECONCILE_GRACE_S", 0.0)
    task_id = submit()
    claim_one(broker)
    broker.cancel(task_id, "default")
    redis_server.client.delete(keys.LEASES)
    assert broker.reconcile() == []
    assert status(broker, task_id) is TaskStatus.CANCELED


def test_sixteen_reapers_requeue_once(broker: Broker, submit: SubmitFn) -> None:
    submit()
    claim_one(broker)
    reaped: list[object] = []
    threads = [threading.Thread(target=lambda: reaped.extend(broker.reap("w1"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reaped) == 1
    assert broker.queues()[0].queued == 1


def test_a_queued_task_expires_at_its_deadline_with_no_worker_about(broker: Broker, submit: SubmitFn) -> None:
    late, patient = submit(deadline_s=0.001), submit(deadline_s=60.0)
    threading.Event().wait(0.05)
    assert broker.expire() == [(late, "")]
    assert broker.expire() == []
    record = broker.view(late)
    assert record is not None
    assert record.error is not None
    assert (record.status, record.error.code) == (TaskStatus.EXPIRED, "deadline_exceeded")
    assert claim_one(broker).task_id == patient


def test_a_look_at_a_task_past_its_deadline_ends_it_with_no_supervisor_about(broker: Broker, submit: SubmitFn) -> None:
    task_id, other = submit(deadline_s=0.001), submit()
    threading.Event().wait(0.05)
    assert status(broker, task_id) is TaskStatus.EXPIRED
    assert status(broker, other) is TaskStatus.QUEUED
    assert broker.queues()[0].queued == 1
    assert (broker.expire(), broker.expire()) == ([(task_id, "")], []), "a supervisor that comes later tells of it"


def test_one_reconciliation_is_enough_for_a_fleet(
    broker: Broker, submit: SubmitFn, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.broker.RECONCILE_GRACE_S", 0.0)
    assert broker.reconcile(0.3) == []
    task_id = submit()
    redis_server.client.delete(keys.RQ_QUEUE + QUEUE)
    assert broker.reconcile(0.3) == []
    threading.Event().wait(0.35)
    assert broker.reconcile(0.3) == [(task_id, "")]


def test_a_task_given_back_still_expires_at_its_deadline(broker: Broker, submit: SubmitFn) -> None:
    submit(deadline_s=0.5)
    task = claim_one(broker)
    broker.release("w1", hold(task))
    threading.Event().wait(0.6)
    assert broker.expire() == [(task.task_id, task.request_id)]


def test_a_claim_sent_again_renews_its_leases(
    settings: Settings, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.broker.secrets.token_hex", lambda _: "same")
    broker = Broker(settings.model_copy(update={"lease_s": 0.8}))
    submit_id = submit()
    claim_one(broker)
    threading.Event().wait(0.5)
    assert claim_one(broker).task_id == submit_id
    threading.Event().wait(0.5)
    assert broker.reap() == []


def test_a_deadline_that_passes_in_the_queue_expires_the_task(broker: Broker, submit: SubmitFn) -> None:
    task_id = submit(deadline_s=0.0001)
    threading.Event().wait(0.1)
    assert not broker.claim("w1", "cpu", ["simulated"], 1).tasks
    record = broker.view(task_id)
    assert record is not None
    assert record.error is not None
    assert (record.status, record.error.code) == (TaskStatus.EXPIRED, "deadline_exceeded")
    assert broker.pending() == 0
    assert broker.expire() == [(task_id, "")]


def test_the_reconciler_puts_back_what_stands_nowhere(
    broker: Broker, submit: SubmitFn, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.broker.RECONCILE_GRACE_S", 0.0)
    stranded, standing, leaseless = submit(), submit(), submit(priority="high")
    claim_one(broker)
    redis_server.client.lrem(keys.RQ_QUEUE + QUEUE, 1, stranded)
    redis_server.client.zrem(keys.LEASES, leaseless)
    assert sorted(moved.task_id for moved in broker.reconcile()) == sorted([stranded, leaseless])
    assert broker.reconcile() == []
    claimed = [task.task_id for task in broker.claim("w2", "cpu", ["simulated"], 9).tasks]
    assert sorted(claimed) == sorted([stranded, standing, leaseless])


def test_a_forged_job_is_never_run(broker: Broker, submit: SubmitFn, redis_server: RedisServer) -> None:
    client = redis_server.client
    submit()
    job_id = "forged"
    client.hset(keys.RQ_JOB + job_id, mapping={"data": json.dumps(["os.system", None, ["true"], {}]), "origin": QUEUE})
    client.lpush(keys.RQ_QUEUE + QUEUE, job_id)
    claimed = broker.claim("w1", "cpu", ["simulated"], 5).tasks
    assert [task.task_id == job_id for task in claimed] == [False]
    assert client.hget(keys.RQ_JOB + job_id, "status") == "failed"


def test_rqs_own_objects_read_the_queues_and_registries(
    broker: Broker, submit: SubmitFn, redis_server: RedisServer
) -> None:
    import redis

    connection = redis.Redis(port=redis_server.port)
    queue = Queue(QUEUE, connection=connection, serializer=JSONSerializer)
    first, _second, _third = submit(), submit(), submit()
    assert queue.count == 3
    job = Job.fetch(first, connection=connection, serializer=JSONSerializer)
    assert (job.args, job.get_status().value, job.origin) == ([first], "queued", QUEUE)
    done, failed = claim_one(broker), claim_one(broker)
    assert (queue.count, StartedJobRegistry(queue=queue).count) == (1, 2)
    broker.finish("w1", hold(done), "succeeded")
    broker.finish("w1", hold(failed), "failed", error=TaskError(code="x", message="y"))
    assert StartedJobRegistry(queue=queue).count == 0
    assert FinishedJobRegistry(queue=queue).get_job_ids() == [done.task_id]
    assert FailedJobRegistry(queue=queue).get_job_ids() == [failed.task_id]
    assert connection.hget(keys.RQ_JOB + first, "data") and b"red circle" not in connection.dump(keys.RQ_JOB + first)


def test_tasks_are_listed_newest_first_page_by_page(broker: Broker, submit: SubmitFn) -> None:
    ids = [submit() for _ in range(25)]
    broker.cancel(ids[3], "default")
    submit(tenant="other")
    seen: list[str] = []
    place = None
    while True:
        page, place = broker.tasks("default", status=None, limit=4, before=place)
        seen += [task.task_id for task in page]
        if place is None:
            break
    assert sorted(seen) == sorted(ids)
    assert len(seen) == 25
    created = [broker.view(task_id).created_at for task_id in seen]  # type: ignore[union-attr]
    assert created == sorted(created, reverse=True)
    only, _ = broker.tasks("default", status=TaskStatus.CANCELED, limit=9, before=None)
    assert [task.task_id for task in only] == [ids[3]]


def test_positions_count_what_stands_before(broker: Broker, submit: SubmitFn) -> None:
    low, first, second = submit(priority="low"), submit(), submit()
    positions = {task_id: broker.view(task_id).position for task_id in (low, first, second)}  # type: ignore[union-attr]
    assert positions == {first: 0, second: 1, low: 2}


def test_events_reach_a_listener(broker: Broker, submit: SubmitFn) -> None:
    seen: list[tuple[str, int, int]] = []
    ready, done = threading.Event(), threading.Event()

    def listen() -> None:
        for event in broker.events(done.is_set):
            if event is None:
                ready.set()
            else:
                seen.append((event.name, event.step, event.steps))
                if event.name == "succeeded":
                    done.set()

    thread = threading.Thread(target=listen)
    thread.start()
    assert ready.wait(5)
    submit()
    task = claim_one(broker)
    broker.progress("w1", {hold(task): (2, 4)})
    broker.finish("w1", hold(task), "succeeded")
    thread.join(5)
    assert seen == [("running", 0, 4), ("progress", 2, 4), ("succeeded", 0, 0)]


def test_nothing_is_left_when_everything_is_final(broker: Broker, submit: SubmitFn, redis_server: RedisServer) -> None:
    for _ in range(6):
        submit()
    for status_ in ("succeeded", "failed", "canceled"):
        broker.finish("w1", hold(claim_one(broker)), status_)
    submit(deadline_s=0.001)
    threading.Event().wait(0.05)
    assert len(broker.expire()) == 1
    for worker in ("w2", "w3", "w4"):
        claim_one(broker, worker)
        for reaped in broker.reap(worker):
            broker.cancel(reaped.task_id, "default")
    client = redis_server.client
    for key in (
        keys.OPEN,
        keys.LEASES,
        keys.DEADLINES,
        keys.RQ_STARTED + QUEUE,
        keys.RQ_QUEUE + QUEUE,
        f"{keys.READY}simulated.normal",
        keys.BACKLOG,
        keys.DUE + "simulated",
    ):
        assert not client.exists(key), key
    for key in client.scan_iter("zf:task:*"):
        assert client.pttl(key) > 0


def test_a_burial_takes_a_worker_from_every_queue_it_has_learnt_of(
    broker: Broker, submit: SubmitFn, redis_server: RedisServer
) -> None:
    submit(tenant="later")
    at = keys.RQ_WORKERS_OF + "simulated.normal.later"
    redis_server.client.sadd(at, keys.RQ_WORKER + "w1", keys.RQ_WORKER + "w2")
    broker.reap("w1")
    assert redis_server.client.smembers(at) == {keys.RQ_WORKER + "w2"}
