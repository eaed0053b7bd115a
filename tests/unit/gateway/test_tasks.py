from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from common.apikeys import ApiKey
from common.broker import Broker
from common.errors import (
    AlreadyFinal,
    IdempotencyConflict,
    QueueFull,
    QuotaUsedUp,
    RedisUnavailable,
    TaskExpired,
    TooLate,
    UnknownTask,
)
from common.schemas import GenerateRequest, Progress, TaskRecord, TaskStatus
from common.settings import Settings
from gateway import tasks as module
from gateway import templates
from gateway.admission import OPEN, Caller
from gateway.diskguard import DiskGuard
from gateway.inputs import Inputs
from gateway.tasks import Tasks
from tests.servers import eventually
from tests.unit.gateway.fake_worker import FakeWorker

ASKED = GenerateRequest(prompt="a red circle", steps=4)


@pytest.fixture
def tasks(broker: Broker, settings: Settings, disk: DiskGuard, pictures: Inputs) -> Iterator[Tasks]:
    tasks = Tasks(broker, settings.catalogue(), disk, pictures, templates.load(settings))
    yield tasks
    tasks.close()


def submit(tasks: Tasks, **options: str) -> str:
    return tasks.submit(ASKED, OPEN, **options).task_id


def later(delay_s: float, call: object) -> threading.Timer:
    assert callable(call)
    timer = threading.Timer(delay_s, call)
    timer.start()
    return timer


def test_tasks_stand_in_line(tasks: Tasks) -> None:
    first, second = (tasks.submit(ASKED, OPEN) for _ in range(2))
    assert (first.status, first.position, second.position) == ("queued", 0, 1)
    assert first.eta_seconds is None
    assert tasks.find(second.task_id, OPEN).position == 1


def test_an_estimate_is_given_once_the_pace_is_known(tasks: Tasks, worker: FakeWorker) -> None:
    worker.beat()
    submit(tasks)
    worker.work()
    assert tasks.submit(ASKED, OPEN).eta_seconds == pytest.approx(0.04)
    assert tasks.submit(ASKED, OPEN).eta_seconds == pytest.approx(0.08)


def test_the_same_key_and_body_are_one_task(tasks: Tasks, worker: FakeWorker) -> None:
    first = submit(tasks, idempotency_key="k")
    assert submit(tasks, idempotency_key="k") == first
    worker.work()
    again = tasks.submit(ASKED, OPEN, idempotency_key="k")
    assert (again.task_id, again.status, again.position) == (first, "succeeded", None)
    with pytest.raises(IdempotencyConflict):
        tasks.submit(GenerateRequest(prompt="another"), OPEN, idempotency_key="k")
    assert submit(tasks, idempotency_key="l") != first


def test_a_full_queue_refuses(broker: Broker, settings: Settings, disk: DiskGuard, pictures: Inputs) -> None:
    full = Tasks(
        Broker(settings.model_copy(update={"queue_cap": 1})),
        settings.catalogue(),
        disk,
        pictures,
        templates.load(settings),
    )
    submit(full)
    with pytest.raises(QueueFull):
        submit(full)
    assert broker.pending() == 1


def test_a_keys_quota_refuses(tasks: Tasks) -> None:
    key = ApiKey(key_id="0123456789ab", tenant="acme", digest="", max_queued=1, created_at=datetime.now(UTC))
    caller = Caller(tenant="acme", key=key)
    first = tasks.submit(ASKED, caller, idempotency_key="k")
    assert tasks.submit(ASKED, caller, idempotency_key="k").task_id == first.task_id
    with pytest.raises(QuotaUsedUp):
        tasks.submit(ASKED, caller)
    assert tasks.submit(ASKED, OPEN).position == 1
    tasks.cancel(first.task_id, caller)
    assert tasks.submit(ASKED, caller).status is TaskStatus.QUEUED


def test_what_would_be_late_is_refused_if_asked_for(tasks: Tasks, worker: FakeWorker) -> None:
    worker.beat()
    submit(tasks)
    worker.work()
    strict = ASKED.model_copy(update={"deadline_s": 0.03, "reject_if_late": True})
    with pytest.raises(TooLate) as refused:
        tasks.submit(strict, OPEN)
    assert refused.value.retry_after_s == pytest.approx(0.01)
    assert tasks.submit(strict.model_copy(update={"deadline_s": 0.05}), OPEN).eta_seconds == pytest.approx(0.04)


@pytest.mark.parametrize("task_id", ["", "x", "0" * 32, "../x", "a\x00b", "ä" * 32, "x" * 5000, "a b", "*"])
def test_an_unknown_id_is_an_unknown_task(tasks: Tasks, task_id: str) -> None:
    for call in (
        lambda: tasks.find(task_id, OPEN),
        lambda: tasks.wait(task_id, 1, OPEN),
        lambda: tasks.cancel(task_id, OPEN),
        lambda: next(tasks.follow(task_id, OPEN)),
    ):
        with pytest.raises(UnknownTask):
            call()


def test_another_tenants_task_is_unknown(tasks: Tasks) -> None:
    task_id = submit(tasks)
    with pytest.raises(UnknownTask):
        tasks.find(task_id, Caller(tenant="other"))
    with pytest.raises(UnknownTask):
        tasks.cancel(task_id, Caller(tenant="other"))
    assert tasks.find(task_id, OPEN).status is TaskStatus.QUEUED


def test_a_result_past_its_retention_is_expired(
    tasks: Tasks, broker: Broker, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = submit(tasks)
    worker.work()
    record = broker.view(task_id)
    assert record is not None
    gone = record.model_copy(update={"expires_at": datetime.now(UTC) - timedelta(seconds=1)})
    monkeypatch.setattr(broker, "view", lambda _id: gone)
    with pytest.raises(TaskExpired):
        tasks.find(task_id, OPEN)
    with pytest.raises(TaskExpired):
        tasks.cancel(task_id, OPEN)


def test_waiting_ends_with_the_task(tasks: Tasks, worker: FakeWorker) -> None:
    task_id = submit(tasks)
    timer = later(0.3, worker.work)
    began = time.monotonic()
    assert tasks.wait(task_id, 30, OPEN).status is TaskStatus.SUCCEEDED
    assert 0.25 < time.monotonic() - began < 9
    timer.join()


def test_waiting_for_a_final_task_answers_at_once(tasks: Tasks, worker: FakeWorker) -> None:
    task_id = submit(tasks)
    worker.work()
    began = time.monotonic()
    assert tasks.wait(task_id, 30, OPEN).status is TaskStatus.SUCCEEDED
    assert time.monotonic() - began < 9


def test_when_the_time_is_up_the_task_is_told_as_it_then_is(tasks: Tasks, worker: FakeWorker) -> None:
    task_id = submit(tasks)
    timer = later(0.1, worker.take)
    began = time.monotonic()
    assert tasks.wait(task_id, 0.9, OPEN).status is TaskStatus.RUNNING
    assert 0.85 < time.monotonic() - began < 9
    timer.join()


def test_no_wait_needs_no_subscription(tasks: Tasks) -> None:
    task_id = submit(tasks)
    assert tasks.wait(task_id, 0, OPEN).status is TaskStatus.QUEUED
    assert not tasks._hub._threads


def deaf(stop: Callable[[], bool], *, ends_only: bool) -> Iterator[None]:
    """Stands in for Broker.events and hears nothing."""
    while not stop():
        time.sleep(0.05)
    yield from ()


def test_an_event_that_never_came_is_made_up_for(
    tasks: Tasks, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks._hub, "_events", deaf)
    monkeypatch.setattr("gateway.waiting.SAFETY_NET_S", 0.2)
    task_id = submit(tasks)
    timer = later(0.1, worker.work)
    began = time.monotonic()
    assert tasks.wait(task_id, 30, OPEN).status is TaskStatus.SUCCEEDED
    assert time.monotonic() - began < 9
    timer.join()


def test_too_many_reads_at_once_are_told_rather_than_hung(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_TURN_S", 0.05)
    monkeypatch.setattr(tasks, "_turns", threading.BoundedSemaphore(1))
    task_id = submit(tasks)
    with tasks._turn(), pytest.raises(RedisUnavailable):
        tasks.wait(task_id, 0.1, OPEN)


def test_closing_answers_whoever_waits(tasks: Tasks) -> None:
    task_id = submit(tasks)
    timer = later(0.3, tasks.close)
    began = time.monotonic()
    assert tasks.wait(task_id, 30, OPEN).status is TaskStatus.QUEUED
    assert time.monotonic() - began < 9
    timer.join()


def test_following_shows_each_change_and_step_and_ends(tasks: Tasks, worker: FakeWorker) -> None:
    task_id = submit(tasks)
    seen: list[TaskRecord | Progress | None] = []
    follower = threading.Thread(target=lambda: seen.extend(tasks.follow(task_id, OPEN)))
    follower.start()
    eventually(lambda: len(tasks._hub._threads) == 2)
    time.sleep(0.5)
    (task,) = worker.take()
    time.sleep(0.1)
    for step in (1, 2):
        worker.step(task, step)
        time.sleep(0.1)
    worker.succeed(task)
    follower.join(5)
    assert not follower.is_alive()
    statuses = [one.status for one in seen if isinstance(one, TaskRecord)]
    assert statuses == ["queued", "running", "succeeded"]
    assert [one for one in seen if isinstance(one, Progress)] == [Progress(step=1, steps=4), Progress(step=2, steps=4)]
    assert tasks._hub._count == 0


def test_following_a_final_task_shows_it_and_ends(tasks: Tasks, worker: FakeWorker) -> None:
    task_id = submit(tasks)
    worker.work()
    (only,) = tasks.follow(task_id, OPEN)
    assert isinstance(only, TaskRecord) and only.status is TaskStatus.SUCCEEDED


def test_a_follower_outlives_redis(tasks: Tasks, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.05)
    task_id = submit(tasks)
    following = tasks.follow(task_id, OPEN)
    assert isinstance(next(following), TaskRecord)

    def away(_id: str) -> TaskRecord:
        raise RedisUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(broker, "view", away)
        assert next(following) is None
    broker.cancel(task_id, "default")
    last = [one for one in following if one is not None][-1]
    assert isinstance(last, TaskRecord) and last.status is TaskStatus.CANCELED


def test_a_queued_task_is_canceled_at_once(tasks: Tasks) -> None:
    task_id = submit(tasks)
    assert tasks.cancel(task_id, OPEN).status is TaskStatus.CANCELED
    with pytest.raises(AlreadyFinal, match="canceled already"):
        tasks.cancel(task_id, OPEN)


def test_a_running_task_is_flagged(tasks: Tasks, worker: FakeWorker) -> None:
    task_id = submit(tasks)
    worker.take()
    record = tasks.cancel(task_id, OPEN)
    assert (record.status, record.cancel_requested) == ("running", True)


def test_pages_go_on_where_the_last_one_ended(tasks: Tasks) -> None:
    ids = [submit(tasks) for _ in range(5)]
    first, then = tasks.page("default", status=None, model=None, limit=3, before=None)
    rest, end = tasks.page("default", status=None, model=None, limit=3, before=then)
    assert {one.task_id for one in first + rest} == set(ids)
    assert len(first) == 3 and end is None
