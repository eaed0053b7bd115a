"""What the transitions count, each once, and the ring of samples, on a real Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from common.broker import Broker
from common.cards import GpuReading, WorkerCard
from common.fleet import lines
from common.link import SCRIPTS
from common.records import Hold
from common.schemas import ImageRef, StageTimings, TaskError
from common.storage.base import Disk
from tests.conftest import SubmitFn
from tests.fleet import submit_many
from tests.servers import RedisServer

IMAGE = ImageRef(key="k", width=64, height=64, format="png", bytes=1, sha256="0" * 64, seed=1)
STAGES = StageTimings(encode_ms=3.2, denoise_ms=700.4, decode_ms=30.0, store_ms=4.0)


def claim(broker: Broker, room: int = 1, worker: str = "h.gpu0.a") -> list[Hold]:
    return [Hold(task.task_id, task.fence) for task in broker.claim(worker, "cpu", ["simulated"], room).tasks]


def due(server: RedisServer, intervals: int = 1) -> None:
    """Let so many intervals pass since the last sample."""
    server.client.set("zf:sampled", int(time.time() / 10) - intervals)


def sampled(broker: Broker, server: RedisServer) -> None:
    """Take the next interval's sample."""
    due(server)
    assert broker.sample()


def test_a_task_counts_from_submit_to_success(broker: Broker, submit: SubmitFn) -> None:
    submit(n=2)
    assert broker.counts() == {"submitted|simulated": 1}
    (hold,) = claim(broker, 2)
    images = [IMAGE, IMAGE]
    for answer in ("ok", "already"):
        assert broker.finish("h.gpu0.a", hold, "succeeded", images=images, stages=STAGES, busy_ms=740) == answer
    found = broker.counts()
    assert {field: n for field, n in found.items() if not field.endswith("|sum")} == {
        "submitted|simulated": 1,
        "waited|simulated|0.1": 1,
        "images|simulated": 2,
        "tasks|simulated|succeeded": 1,
        "took|simulated|0.1": 1,
        "stage|simulated|encode|0.005": 1,
        "stage|simulated|denoise|1": 1,
        "stage|simulated|decode|0.05": 1,
        "stage|simulated|store|0.005": 1,
    }, "a stage that took no time, as load, is none"
    assert (found["stage|simulated|denoise|sum"], found["stage|simulated|encode|sum"]) == (700_400, 3_200), "µs"


def test_what_is_sent_twice_counts_once(broker: Broker, redis_server: RedisServer) -> None:
    sent: list[tuple[str, tuple[str | float, ...]]] = []
    run = broker._run

    def twice(script: str, *args: str | float, **named: object) -> object:
        sent.append((script, args))
        reply = run(script, *args)
        source, _ = SCRIPTS[script]
        before = broker.counts()
        redis_server.client.eval(source, 0, *args)
        assert broker.counts() == before, f"{script} counted twice"
        return reply

    broker._run = twice  # type: ignore[assignment, method-assign]
    ids = submit_many(broker, 5)
    holds = claim(broker, 4)
    broker.finish("h.gpu0.a", holds[0], "succeeded", images=[IMAGE], stages=STAGES)
    error = TaskError(code="deadline_exceeded", message="late")
    broker.finish("h.gpu0.a", holds[1], "failed", error=error, fuse="deadline")
    broker.release("h.gpu0.a", holds[2])
    broker.reap("h.gpu0.a", [holds[3].task_id], crashed=True)
    broker.cancel(ids[4], None)
    assert {script for script, _ in sent} >= {"submit", "claim", "finish", "release", "reap", "cancel"}
    found = broker.counts()
    assert found["submitted|simulated"] == 5 and found["crashes"] == found["reaped|requeued"] == 1
    ends = [found[f"tasks|simulated|{outcome}"] for outcome in ("succeeded", "failed", "canceled")]
    assert ends == [1, 1, 1] and found["fuses|deadline"] == 1


def test_time_in_queue_counts_until_the_first_attempt_only(broker: Broker, submit: SubmitFn) -> None:
    submit()
    for _ in range(3):
        (hold,) = claim(broker)
        broker.release("h.gpu0.a", hold)
    assert broker.counts()["waited|simulated|0.1"] == 1


def test_a_task_that_expires_or_is_quarantined_counts_as_that(broker: Broker, submit: SubmitFn) -> None:
    submit(deadline_s=0.001)
    time.sleep(0.01)
    broker.expire()
    poison = submit()
    for nth in range(3):
        claim(broker, worker=f"h.gpu0.{nth}")
        broker.reap(f"h.gpu0.{nth}", [poison], crashed=True)
    found = broker.counts()
    assert (found["tasks|simulated|expired"], found["tasks|simulated|failed"]) == (1, 1)
    assert (found["reaped|requeued"], found["reaped|quarantined"], found["crashes"]) == (2, 1, 3)


def test_a_worker_that_left_as_it_was_asked_to_is_no_crash(broker: Broker) -> None:
    broker.reap("h.gpu0.a")
    assert "crashes" not in broker.counts()


def test_an_interval_is_sampled_once_whoever_asks(broker: Broker, redis_server: RedisServer) -> None:
    redis_server.client.set("zf:sampled", "0")
    taken = sum(broker.sample() for _ in range(20))
    assert taken in (1, 2), "2, where an interval ended just then"
    assert redis_server.client.llen("zf:history:15m") == taken


def test_the_ring_keeps_its_size(broker: Broker, redis_server: RedisServer) -> None:
    for _ in range(100):
        begins_a_longer_step = int(time.time() / 10) % 24 == 0
        due(redis_server, -1 if begins_a_longer_step else 1)  # another interval of the same longer step
        assert broker.sample()
    assert redis_server.client.llen("zf:history:15m") == 91
    due(redis_server, 24)
    broker.sample()
    due(redis_server, 720)
    broker.sample()
    assert redis_server.client.llen("zf:history:15m") == 91
    assert 3 <= redis_server.client.llen("zf:history:6h") <= 5
    assert 2 <= redis_server.client.llen("zf:history:7d") <= 4
    assert redis_server.client.memory_usage("zf:history:15m") < 100_000


def test_a_sample_has_counters_and_how_the_fleet_stands(
    broker: Broker, submit: SubmitFn, redis_server: RedisServer, card: Callable[[str], WorkerCard]
) -> None:
    reading = GpuReading(name="H100", index=0, memory_used_mb=500, utilisation_percent=80)
    beside = GpuReading(name="H100", index=1, memory_used_mb=300, utilisation_percent=100)
    for name, gpu in (("h.gpu0.a", reading), ("h.gpu0.b", reading), ("h.gpu1.a", beside), ("h.cpu2.a", None)):
        broker.beat(card(name).model_copy(update={"gpu": gpu}), [], 60)
    broker.beat(card("h.gpu3.lost").model_copy(update={"state": "lost"}), [], 60)
    broker.sample()
    for _ in range(3):
        submit()
    (hold,) = claim(broker)
    broker.finish("h.gpu0.a", hold, "succeeded", images=[IMAGE])
    claim(broker)
    due(redis_server)
    broker.sample()
    (point,) = broker.history("15m")
    assert (point.submitted, point.succeeded, point.failed, point.images) == (3, 1, 0, 1)
    assert (point.queued, point.running, point.workers) == (1, 1, 4)
    assert (point.gpu_utilisation_percent, point.gpu_memory_used_mb) == (90, 800), "a GPU that two share is one"
    assert point.oldest_age_seconds is not None and 0 <= point.oldest_age_seconds < 10
    assert point.p95_seconds is not None and 0 < point.p95_seconds <= 0.1
    counts = json.loads(redis_server.client.lindex("zf:history:15m", -1))["counts"]
    assert not any("simulated" in field for field in counts) and counts["took|0.1"] == 1, "summed over models"


def test_a_sample_has_what_waits_by_model_and_priority(
    broker: Broker, submit: SubmitFn, redis_server: RedisServer
) -> None:
    for tenant, model, priority in (
        ("a", "simulated", "normal"), ("b", "simulated", "normal"), ("a", "simulated", "low"), ("a", "pico", "high"),
    ):  # fmt: skip
        for _ in range(2):
            submit(tenant=tenant, model=model, priority=priority)
    claim(broker, 2)
    redis_server.client.sadd("rq:queues", "rq:queue:webhooks.acme", "rq:queue:somebody", "rq:queue:simulated.high.gone")
    redis_server.client.rpush("rq:queue:webhooks.acme", "x")
    redis_server.client.rpush("rq:queue:simulated.low.forged", "x")
    redis_server.client.sadd("rq:queues", "rq:queue:simulated.low.forged")
    broker.sample()
    told = {(line.model, line.priority): line for line in lines(broker.queues())}
    due(redis_server)
    broker.sample()
    (point,) = broker.history("15m")
    assert point.queues is not None
    assert [(queue.model, queue.priority, queue.queued) for queue in point.queues] == [
        ("pico", "high", 2), ("simulated", "normal", 2), ("simulated", "low", 3)
    ]  # fmt: skip
    for queue in point.queues:
        then = told[queue.model, queue.priority]
        assert then.queued == queue.queued, "as GET /api/fleet has it"
        assert then.oldest_age_seconds is not None and queue.oldest_age_seconds is not None
        assert then.oldest_age_seconds <= queue.oldest_age_seconds < then.oldest_age_seconds + 10


def test_nothing_that_waits_is_known_as_that(broker: Broker, redis_server: RedisServer) -> None:
    sampled(broker, redis_server)
    sampled(broker, redis_server)
    (point,) = broker.history("15m")
    assert point.queues == []


def test_what_waits_costs_a_sample_by_its_queues_and_not_by_its_tasks(
    broker: Broker, redis_server: RedisServer
) -> None:
    def commands() -> int:
        told = redis_server.client.info("commandstats")
        before = sum(each["calls"] for each in told.values())
        sampled(broker, redis_server)
        told = redis_server.client.info("commandstats")
        return int(sum(each["calls"] for each in told.values()) - before)

    submit_many(broker, 5)
    few = commands()
    submit_many(broker, 95)
    assert commands() <= few + 10, "a window's step may have begun"


def test_a_sample_of_an_earlier_version_is_read_and_tells_nothing_of_queues(
    broker: Broker, redis_server: RedisServer
) -> None:
    now = int(time.time() * 1000)
    for at in (now - 10_000, now):
        old = {"at": at, "counts": {"images": 1}, "queued": 3, "running": 0, "workers": 1}
        redis_server.client.rpush("zf:history:15m", json.dumps(old))
    (point,) = broker.history("15m")
    assert (point.queued, point.queues, point.joules_per_image) == (3, None, None)


def test_energy_is_what_readings_have_grown_by_each_gpu_once(
    broker: Broker, redis_server: RedisServer, card: Callable[[str], WorkerCard]
) -> None:
    def told(**joules: float | None) -> int | None:
        """Return what is counted once workers have told: `a0b` is a worker of host a's GPU 0."""
        for name, energy in joules.items():
            gpu = GpuReading(name="H100", index=int(name[1]), energy_j=energy)
            broker.beat(card(f"h.gpu{name[1]}.{name}").model_copy(update={"host": name[0], "gpu": gpu}), [], 60)
        sampled(broker, redis_server)
        return broker.counts().get("joules")

    assert told(a0=None) is None, "nobody has told"
    assert told(a0=1000.9) == 0, "what it used before is nobody's"
    assert told(a0=1700.2, a0b=1800.0, a1=50_000.0) == 800, "two workers share a GPU: its newest reading counts"
    assert told(a0=1850.0, a0b=1900.0, a1=50_100.0) == 1000
    assert told(a0=1900.0, a0b=5.0, b0=7.0) == 1000, "a driver was loaded again; another host has a GPU 0"
    assert told(a0b=6.5, b0=7.6) == 1001, "whole joules, of which none is lost"
    assert told(b0=8.0) == 1002
    redis_server.client.hset("zf:energy", "b|0", f"8 {int(time.time() * 1000) - 301_000}")
    assert told(b0=90_000.0) == 1002, "what it used while nobody told of it"
    assert set(redis_server.client.hkeys("zf:energy")) == {"a|0", "a|1", "b|0"}
    redis_server.client.hset("zf:energy", "gone|0", f"8 {int(time.time() * 1000) - 301_000}")
    sampled(broker, redis_server)
    assert "gone|0" not in redis_server.client.hkeys("zf:energy"), "hosts that come and go leave nothing behind"


def test_energy_per_image_is_of_a_step_and_of_late(
    broker: Broker, submit: SubmitFn, redis_server: RedisServer, card: Callable[[str], WorkerCard]
) -> None:
    def told(joules: float | None, images: int = 0) -> None:
        gpu = GpuReading(name="H100", index=0, energy_j=joules)
        broker.beat(card("h.gpu0.a").model_copy(update={"gpu": gpu}), [], 60)
        for _ in range(images):
            submit()
            (hold,) = claim(broker)
            broker.finish("h.gpu0.a", hold, "succeeded", images=[IMAGE])
        sampled(broker, redis_server)

    for joules, images in ((5000.0, 0), (6500.0, 3), (7000.0, 0), (None, 2)):
        told(joules, images)
    assert [point.joules_per_image for point in broker.history("15m")] == [500.0, None, None]
    assert broker.recent().joules_per_image == 400.0, "idling included"


def test_crashes_and_tripped_fuses_are_of_a_step_and_of_late(
    broker: Broker, submit: SubmitFn, redis_server: RedisServer
) -> None:
    broker.reap("h.gpu0.d", crashed=True)
    sampled(broker, redis_server)
    for worker in "bc":
        broker.reap(f"h.gpu0.{worker}", crashed=True)
    submit()
    (hold,) = claim(broker)
    broker.finish("h.gpu0.a", hold, "failed", fuse="run_limit")
    sampled(broker, redis_server)
    sampled(broker, redis_server)
    assert [(point.crashes, point.fuses) for point in broker.history("15m")] == [(2, 1), (0, 0)]
    assert (broker.recent().crashes, broker.recent().fuses) == (2, 1)


def test_without_gpus_or_workers_their_figures_are_null(broker: Broker, redis_server: RedisServer) -> None:
    broker.sample()
    due(redis_server)
    broker.sample()
    (point,) = broker.history("15m")
    assert (point.workers, point.gpu_utilisation_percent, point.gpu_memory_used_mb) == (0, None, None)
    assert (point.oldest_age_seconds, point.error_ratio, point.p50_seconds) == (None, None, None)


def test_disks_are_told_by_host_and_forgotten_when_nobody_tells(broker: Broker, redis_server: RedisServer) -> None:
    broker.note_disk("a", Disk(free=10, size=100))
    broker.note_disk("b", Disk(free=20, size=200))
    redis_server.client.hset("zf:disks", "b", f"20 200 {int(time.time() * 1000) - 61_000}")
    assert broker.disks() == {"a": Disk(10, 100)}
    due(redis_server)
    broker.sample()
    assert redis_server.client.hkeys("zf:disks") == ["a"], "hosts that come and go leave nothing behind"


@pytest.mark.parametrize("window", ["15m", "6h", "7d"])
def test_a_young_fleet_has_no_history(broker: Broker, window: str) -> None:
    assert broker.history(window) == []
    assert broker.recent().tasks_per_minute is None
