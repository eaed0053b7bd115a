"""Whoever writes to Redis without being a gateway gets nothing run or imported by a worker."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from pathlib import Path

import pytest

from common.broker import Broker
from common.settings import Settings
from tests.conftest import SubmitFn
from tests.fleet import await_final, ready_workers
from tests.payload import Payload
from tests.samples import encoded
from tests.servers import RedisServer, WorkerServer
from tests.unit.gateway.fake_worker import FakeWorker

QUEUE = "simulated.normal.default"


def jobs(mark: Path) -> dict[str, dict[str, bytes | str]]:
    """Hashes of jobs as an attacker may write them, by id; each would leave the mark if anything in it were run."""
    touch = f"touch '{mark}'"
    spiked = pickle.dumps(Payload(mark))
    ours = json.dumps(["zfleet.task", None, ["ours"], {}])
    shapes: dict[str, dict[str, bytes | str]] = {
        "os-system": {"data": json.dumps(["os.system", None, [touch], {}])},
        "compressed": {"data": zlib.compress(json.dumps(["os.system", None, [touch], {}]).encode())},
        "pickle": {"data": spiked},
        "compressed-pickle": {"data": zlib.compress(spiked)},
        "pickled-meta": {"data": ours, "meta": spiked},
        "callback": {"data": ours, "success_callback_name": "os.system", "failure_callback_name": "os.system"},
        "serializer": {"data": spiked, "serializer": "pickle", "job_class": "os.system"},
        "no-record": {"data": ours},
        "no-data": {"origin": QUEUE},
        "no-json": {"data": "{"},
    }
    return {name: {"origin": QUEUE, "status": "queued", **shape} for name, shape in shapes.items()}


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it was run"


def test_nothing_of_a_forged_job_is_run(
    broker: Broker, settings: Settings, redis_server: RedisServer, submit: SubmitFn, tmp_path: Path, mark: Path
) -> None:
    forged = jobs(mark)
    client = redis_server.client
    submit()  # so that the line is open
    outside = _names_a_file_outside(submit(), redis_server, tmp_path)
    for name, shape in forged.items():
        client.hset(f"rq:job:{name}", mapping=shape)
        client.lpush(f"rq:queue:{QUEUE}", name)
    client.lpush(f"rq:queue:{QUEUE}", "no-job-at-all", "../../etc/passwd", "x" * 10_000)
    with WorkerServer(settings, tmp_path / "worker.log"):
        ready_workers(broker)
        await_final(broker, [submit()])
        (task,) = await_final(broker, [outside])
    assert not mark.exists()
    assert task.status == "failed" and task.images == []
    assert {client.hget(f"rq:job:{name}", "status") for name in forged} == {"failed"}
    assert {client.hget(f"rq:job:{name}", "exc_info") for name in forged} == {"not a zfleet task"}


def _names_a_file_outside(task_id: str, redis_server: RedisServer, folder: Path) -> str:
    """Let a record say that its picture is to be read from a file that is none of the storage's."""
    (folder / "outside.png").write_bytes(encoded())
    request = json.loads(redis_server.client.hget(f"zf:task:{task_id}", "request") or "{}")
    changed = json.dumps(request | {"init_image": os.fspath(folder / "outside"), "strength": 0.5})
    redis_server.client.hset(f"zf:task:{task_id}", "request", changed)
    return task_id


@pytest.mark.parametrize(
    "request_text",
    [
        "",
        "{",
        "null",
        "[]",
        '{"prompt": 1}',
        '{"__class__": "os.system"}',
        '{"prompt": "x", "model": "os"}',
        "\x04.",
    ],
)
def test_a_record_that_cannot_be_read_fails_alone(
    broker: Broker, settings: Settings, redis_server: RedisServer, submit: SubmitFn, request_text: str
) -> None:
    forged, sound = submit(), submit()
    redis_server.client.hset(f"zf:task:{forged}", "request", request_text)
    claimed = broker.claim("w1", "cpu", ["simulated"], 5).tasks
    assert [task.task_id for task in claimed] == [sound]
    error = json.loads(redis_server.client.hget(f"zf:task:{forged}", "error") or "{}")
    assert error["code"] == "unreadable_record"


def test_a_task_in_another_tenants_queue_stays_its_owners(
    broker: Broker, redis_server: RedisServer, submit: SubmitFn
) -> None:
    mine, theirs = submit(tenant="acme"), submit(tenant="other")
    redis_server.client.rpush("rq:queue:simulated.normal.other", mine)
    worker = FakeWorker(broker)
    claimed = worker.take(5)
    assert sorted(task.task_id for task in claimed) == sorted([mine, theirs]), "once, though it stood in line twice"
    for task in claimed:
        worker.succeed(task)
    assert worker.take(5) == [] and broker.pending() == 0
    assert broker.cancel(mine, "other") == "unknown" and broker.cancel(mine, "acme") == "final"
    assert [task.task_id for task in broker.tasks("other", status=None, limit=9, before=None)[0]] == [theirs]
