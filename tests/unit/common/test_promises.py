"""What was promised holds, though Redis comes back without its last moments: a real Redis, killed, its file cut."""

from __future__ import annotations

import dataclasses
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from structlog.testing import capture_logs

from common import promises
from common.broker import Broker
from common.connection import Command
from common.errors import RedisUnavailable
from common.records import Event, Hold, NewTask
from common.schemas import ImageRef, TaskStatus
from common.settings import Settings
from tests.conftest import resolved
from tests.servers import RedisServer, eventually


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    (tmp_path / "redis").mkdir()
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def open_broker(settings: Settings, server: RedisServer) -> Iterator[Callable[..., Broker]]:
    opened: list[Broker] = []

    def open_one(**changes: object) -> Broker:
        opened.append(Broker(settings.model_copy(update={"redis_url": server.url, **changes}), patience_s=20.0))
        return opened[-1]

    yield open_one
    for broker in opened:
        broker.close()


@pytest.fixture
def broker(open_broker: Callable[..., Broker]) -> Broker:
    return open_broker()


def new_task(key: str = "", **changes: object) -> NewTask:
    return NewTask(
        task_id=secrets.token_hex(16), tenant="default", request=resolved(**changes), idempotency_key=key, body_hash="b"
    )


def submit(broker: Broker, count: int = 1) -> list[str]:
    return [broker.submit(new_task()).task_id for _ in range(count)]


@contextmanager
def forgotten(server: RedisServer, outage_s: float = 0.0) -> Iterator[None]:
    """What is done in here, Redis will not remember."""
    written = server.written()
    yield
    server.kill()
    server.forget(written)
    time.sleep(outage_s)
    server.start()


def status(broker: Broker, task_id: str) -> TaskStatus | None:
    record = broker.view(task_id)
    return record and record.status


def replayed(logs: list[dict[str, object]]) -> list[tuple[object, object]]:
    return [(line["count"], line["told"]) for line in logs if line["event"] == "promises_replayed"]


def test_a_forgotten_submit_is_there_at_the_next_look(broker: Broker, server: RedisServer) -> None:
    kept = submit(broker, 3)
    with capture_logs() as logs:
        with forgotten(server):
            lost = submit(broker, 3)
        assert not server.client.exists("zf:task:" + lost[0]), "this test cut nothing off"
        assert [status(broker, task_id) for task_id in kept + lost] == [TaskStatus.QUEUED] * 6
    assert replayed(logs) == [(3, 6)]
    assert server.client.lrange("rq:queue:simulated.normal.default", 0, -1) == kept + lost


def test_nothing_forgotten_is_nothing_done(broker: Broker, server: RedisServer) -> None:
    task_ids = submit(broker, 3)
    server.kill()
    server.start()
    before = server.written()
    with capture_logs() as logs:
        assert [status(broker, task_id) for task_id in task_ids] == [TaskStatus.QUEUED] * 3
    assert not replayed(logs)
    assert server.written() == before


def test_a_forgotten_cancel_holds(broker: Broker, server: RedisServer) -> None:
    running, queued = submit(broker, 2)
    assert [task.task_id for task in broker.claim("w1", "cpu", ["simulated"], 1).tasks] == [running]
    with forgotten(server):
        assert broker.cancel(queued, "default") == "canceled"
        assert broker.cancel(running, "default") == "flagged"
    assert status(broker, queued) is TaskStatus.CANCELED
    record = broker.view(running)
    assert record and record.cancel_requested


def test_a_forgotten_finish_holds(broker: Broker, server: RedisServer) -> None:
    (task_id,) = submit(broker)
    broker.claim("w1", "cpu", ["simulated"], 1)
    with forgotten(server):
        assert broker.finish("w1", Hold(task_id, 1), "succeeded") == "ok"
    record = broker.view(task_id)
    assert record and [attempt.outcome for attempt in record.attempts] == ["succeeded"]


def test_a_finish_holds_though_its_claim_is_forgotten_as_well(broker: Broker, server: RedisServer) -> None:
    """A client may have seen that end."""
    (task_id,) = submit(broker)
    with forgotten(server):
        broker.claim("w1", "cpu", ["simulated"], 1)
        broker.finish("w1", Hold(task_id, 1), "succeeded", busy_ms=40.0)
    record = broker.view(task_id)
    assert record is not None
    assert (record.status, [a.outcome for a in record.attempts]) == (TaskStatus.SUCCEEDED, ["succeeded"])
    assert not broker.claim("w2", "cpu", ["simulated"], 1).tasks
    assert (broker.pending(), sum(queue.queued + queue.running for queue in broker.queues())) == (0, 0)


def test_a_finish_that_was_forgotten_comes_before_whoever_runs_its_task_by_now(
    broker: Broker, open_broker: Callable[..., Broker], server: RedisServer
) -> None:
    (task_id,) = submit(broker)
    with forgotten(server):
        broker.claim("w1", "cpu", ["simulated"], 1)
        broker.finish("w1", Hold(task_id, 1), "succeeded")
    other = open_broker()
    (again,) = other.claim("w2", "cpu", ["simulated"], 1).tasks
    assert (again.task_id, again.fence) == (task_id, 1)
    assert status(broker, task_id) is TaskStatus.SUCCEEDED
    assert other.finish("w2", Hold(task_id, 1), "succeeded") == "lost"
    record = broker.view(task_id)
    assert record is not None
    assert [(a.worker, a.outcome) for a in record.attempts] == [("w2", "lost"), ("w1", "succeeded")]
    assert sum(queue.queued + queue.running for queue in broker.queues()) == 0


def test_an_accepted_task_comes_back_into_a_queue_that_is_full_by_now(
    open_broker: Callable[..., Broker], server: RedisServer
) -> None:
    broker = open_broker(queue_cap=2)
    with forgotten(server):
        accepted = submit(broker, 2)
    others = submit(open_broker(queue_cap=2), 2)
    assert [status(broker, task_id) for task_id in accepted + others] == [TaskStatus.QUEUED] * 4


def test_an_accepted_task_comes_back_whatever_its_key_has_in_line_by_now_and_however_late_it_would_be(
    open_broker: Callable[..., Broker], server: RedisServer
) -> None:
    def limited(deadline_s: float = 60.0) -> NewTask:
        task = new_task(deadline_s=deadline_s)
        return dataclasses.replace(task, key_id="0123456789ab", max_queued=1, reject_if_late=True)

    broker = open_broker()
    with forgotten(server):
        mine = broker.submit(limited()).task_id
    other = open_broker().submit(limited()).task_id  # before this process was able to tell
    assert status(broker, mine) is TaskStatus.QUEUED
    assert server.client.smembers("zf:queued:0123456789ab") == {mine, other}


def test_an_idempotency_key_keeps_its_task(open_broker: Callable[..., Broker], server: RedisServer) -> None:
    broker = open_broker()
    with forgotten(server):
        first = broker.submit(new_task("key")).task_id
    assert broker.submit(new_task("key")).task_id == first
    with forgotten(server):
        mine = broker.submit(new_task("other key")).task_id
    theirs = open_broker().submit(new_task("other key")).task_id  # before this process was able to tell
    assert mine != theirs
    assert broker.submit(new_task("other key")).task_id == theirs, "one key has two tasks"
    assert broker.pending() == 2


def test_an_outage_of_any_length_drops_no_promise(
    broker: Broker, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promises, "HORIZON_S", 0.2)
    with forgotten(server, outage_s=0.5):
        (task_id,) = submit(broker)
    assert status(broker, task_id) is TaskStatus.QUEUED


def test_what_is_told_again_and_forgotten_again_is_told_again(broker: Broker, server: RedisServer) -> None:
    with forgotten(server):
        (task_id,) = submit(broker)
    with forgotten(server):
        assert status(broker, task_id) is TaskStatus.QUEUED
    assert status(broker, task_id) is TaskStatus.QUEUED


def test_old_promises_are_let_go(broker: Broker, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "HORIZON_S", 0.1)
    submit(broker, 5)
    time.sleep(0.2)
    with forgotten(server):
        (task_id,) = submit(broker)
    with capture_logs() as logs:
        assert status(broker, task_id) is TaskStatus.QUEUED
    assert replayed(logs) == [(1, 1)]


def test_a_slow_redis_is_not_told_what_it_knows(broker: Broker, server: RedisServer) -> None:
    submit(broker, 3)
    for _ in range(2):  # the first outage teaches the history's name
        server.client.client_kill_filter(_type="normal", skipme=True)
        broker.probe()
    before = server.client.info("commandstats")["cmdstat_evalsha"]["calls"]
    server.client.client_kill_filter(_type="normal", skipme=True)
    broker.probe()
    assert server.client.info("commandstats")["cmdstat_evalsha"]["calls"] == before


def test_an_idle_gateway_tells_by_its_subscription(broker: Broker, server: RedisServer) -> None:
    heard: list[Event | None] = []
    done = threading.Event()

    def listen() -> None:
        heard.extend(broker.events(done.is_set, ends_only=True))

    listener = threading.Thread(target=listen)
    with forgotten(server):
        listener.start()
        (task_id,) = submit(broker)
        eventually(lambda: server.client.pubsub_numsub("zf:ends")[0][1] == 1)
    eventually(lambda: server.client.exists("zf:task:" + task_id), within_s=5)
    done.set()
    listener.join()
    assert set(heard) == {None}


def test_many_threads_wait_for_the_one_that_tells(broker: Broker, server: RedisServer) -> None:
    missing: list[str] = []

    def look(task_ids: list[str]) -> None:
        missing.extend(task_id for task_id in task_ids if status(broker, task_id) is None)

    with forgotten(server):
        task_ids = submit(broker, 600)
    with capture_logs() as logs:
        threads = [threading.Thread(target=look, args=(task_ids[i::16],)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not missing
    assert replayed(logs) == [(600, 600)]


def test_a_telling_that_fails_is_begun_again(
    broker: Broker, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with forgotten(server):
        (task_id,) = submit(broker)
    tell, failures = promises.run_scripts, iter(range(2))

    def stumble(*args: object) -> list[object]:
        for _ in failures:
            raise redis.ConnectionError("gone again")
        return tell(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(promises, "run_scripts", stumble)
    assert status(broker, task_id) is TaskStatus.QUEUED


def test_a_promise_that_redis_now_refuses_does_not_hold_up_the_rest(broker: Broker, server: RedisServer) -> None:
    with forgotten(server):
        (refused,) = submit(broker)
        broker.cancel(refused, "default")
        (kept,) = submit(broker)
    server.client.set("zf:task:" + refused, "not a hash")
    assert status(broker, kept) is TaskStatus.QUEUED


def test_a_redis_that_hangs_is_told_within_the_patience_of_every_thread(
    settings: Settings, server: RedisServer
) -> None:
    hasty = Broker(settings.model_copy(update={"redis_url": server.url}))
    submit(hasty, 3)
    server.signal(signal.SIGSTOP)
    took: list[float] = []

    def look() -> None:
        began = time.monotonic()
        with pytest.raises(RedisUnavailable):
            hasty.pending()
        took.append(time.monotonic() - began)

    threads = [threading.Thread(target=look) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.signal(signal.SIGCONT)
    assert len(took) == 16
    assert max(took) < 3
    assert hasty.pending() == 3


def test_what_the_old_primary_still_took_is_told_to_the_new_one_on_every_way_to_it() -> None:
    """One connection has met the heir already, while another was still accepted by the primary on its way out."""
    told: list[tuple[str, str]] = []

    def server(history: str) -> Callable[[Sequence[Command]], tuple[list[object], str]]:
        def send(commands: Sequence[Command]) -> tuple[list[object], str]:
            told.extend((history, str(command[3])) for command in commands if command[0] == "EVALSHA")
            return [["exists"] for _ in commands], history

        return send

    ours = promises.Promises({"submit": ("source", "sha")})
    ours.connected("old", server("old"))
    ours.connected("heir", server("heir"))
    ours.heed("submit", ("task",), ["created", "task", 0, ""], "old")
    ours.renew(server("old"))
    ours.answered()
    told.clear()
    ours.connected("heir", server("heir"))
    assert told == [("heir", "task")]
    ours.connected("heir", server("heir"))
    assert told == [("heir", "task")]


def test_a_result_that_comes_too_late_again_is_void_and_one_that_stands_is_not(
    open_broker: Callable[..., Broker], server: RedisServer, settings: Settings
) -> None:
    void: list[tuple[str, int]] = []
    there = settings.model_copy(update={"redis_url": server.url})
    broker = Broker(there, patience_s=20.0, void=lambda task_id, fence: void.append((task_id, fence)))
    late, stands = submit(broker, 2)
    with forgotten(server):
        for task_id in (late, stands):
            (task,) = broker.claim("w1", "cpu", ["simulated"], 1).tasks
            assert broker.finish("w1", Hold(task_id, task.fence), "succeeded", images=[image(task_id)]) == "ok"
    other = open_broker()
    (task,) = other.claim("w2", "cpu", ["simulated"], 1).tasks
    assert (task.task_id, other.finish("w2", Hold(late, task.fence), "succeeded")) == (late, "ok")
    assert status(broker, stands) is TaskStatus.SUCCEEDED
    assert void == [(late, 1)]
    server.kill()
    server.start()  # and now it is told again what it did not forget
    assert status(broker, stands) is TaskStatus.SUCCEEDED
    assert (stands, 1) not in void
    broker.close()


def image(task_id: str) -> ImageRef:
    return ImageRef(key=f"a/{task_id}/0.png", width=1, height=1, format="png", bytes=1, sha256="", seed=1)
