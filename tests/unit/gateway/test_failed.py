"""What failed, done over or removed by an operator, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from flask.testing import FlaskClient
from redis import Redis
from rq import Queue
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer
from werkzeug.test import TestResponse

from common.broker import Broker
from common.inputs import new_handle, storage_key
from common.settings import Settings
from common.storage import open_storage
from common.storage.base import attempt_folder
from gateway import failed as module
from tests.conftest import SubmitFn
from tests.servers import RedisServer, eventually
from tests.tenants import bearer, new_key
from tests.unit.gateway.fake_worker import FakeWorker


@pytest.fixture
def failed(submit: SubmitFn, worker: FakeWorker) -> Sequence[str]:
    """Three of acme's and two of other's."""
    ids = [submit(tenant=tenant, webhook=HOOK) for tenant in ("acme", "acme", "acme", "other", "other")]
    for task in worker.take(5):
        worker.fail(task)
    return ids


HOOK = {"url": "https://example.com/told", "events": ["started", "ended"]}


def clear(client: FlaskClient, what: str, **batch: object) -> TestResponse:
    return client.post(f"/api/failed/{what}", json=batch)


def in_rq(redis_server: RedisServer, tenant: str) -> set[str]:
    queue = Queue(f"simulated.normal.{tenant}", connection=Redis(port=redis_server.port), serializer=JSONSerializer)
    return set(FailedJobRegistry(queue=queue).get_job_ids(cleanup=False))


def test_each_is_done_over_once_in_batches(
    client: FlaskClient, broker: Broker, worker: FakeWorker, failed: Sequence[str]
) -> None:
    first = clear(client, "requeue", limit=2).get_json()
    rest = clear(client, "requeue").get_json()
    assert (len(first["requeued"]), first["more"]) == (2, True)
    assert (len(rest["requeued"]), rest["more"], rest["refused"]) == (3, False, [])
    pairs = {one["task_id"]: one["new_task_id"] for one in first["requeued"] + rest["requeued"]}
    assert pairs.keys() == set(failed)
    assert clear(client, "requeue").get_json() == {"requeued": [], "refused": [], "more": False, "next_cursor": None}
    records = [broker.view(task_id) for task_id in pairs.values()]
    assert {record.retry_of for record in records if record} == set(failed)
    assert sorted(record.tenant for record in records if record) == ["acme"] * 3 + ["other"] * 2


def test_one_tenant_or_one_model(client: FlaskClient, failed: Sequence[str]) -> None:
    assert clear(client, "requeue", model="pico").get_json()["requeued"] == []
    found = clear(client, "requeue", tenant="other", model="simulated").get_json()["requeued"]
    assert {one["task_id"] for one in found} == set(failed[3:])
    assert clear(client, "purge", tenant="acme").get_json() == {"purged": 3, "more": False}


def test_what_cannot_be_done_over_is_told_and_passed_over(
    client: FlaskClient, submit: SubmitFn, worker: FakeWorker
) -> None:
    cut_off = new_handle("default")
    lost = [submit(init_image=handle) for handle in ("img_" + "0" * 32, cut_off)]
    good = submit()
    assert worker.storage is not None
    worker.storage.put(storage_key(cut_off), b"")  # without any the storage's folder would be one that is away
    for task in worker.take(3):
        worker.fail(task)
    answer = clear(client, "requeue").get_json()
    assert [one["task_id"] for one in answer["requeued"]] == [good]
    assert {one["task_id"]: one["code"] for one in answer["refused"]} == dict.fromkeys(lost, "input_gone")
    assert not answer["more"]


def walk(client: FlaskClient, limit: int) -> list[dict[str, list[str]]]:
    """Call until there is no more, as the dashboard does; return what each call did."""
    found: list[dict[str, list[str]]] = []
    cursor: dict[str, str] = {}
    for _ in range(20):
        answer = clear(client, "requeue", limit=limit, **cursor).get_json()
        found.append({what: [one["task_id"] for one in answer[what]] for what in ("requeued", "refused")})
        assert answer["more"] == (answer["next_cursor"] is not None)
        if not answer["more"]:
            return found
        cursor = {"cursor": answer["next_cursor"]}
    pytest.fail("it never ends")


def test_a_call_is_bounded_by_what_it_refuses_too_and_no_task_comes_twice(
    client: FlaskClient, submit: SubmitFn, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [submit(init_image="img_" + "0" * 32, tenant=tenant) for tenant in ("acme", "acme", "acme", "b", "b")]
    good = [submit(tenant="c") for _ in range(2)]
    assert worker.storage is not None
    worker.storage.put("20260131/x", b"x")
    for task in worker.take(7):
        worker.fail(task)
    calls = walk(client, 2)
    assert [len(one["requeued"]) + len(one["refused"]) for one in calls] == [2, 2, 2, 1]
    assert sorted(task for one in calls for task in one["refused"]) == sorted(gone)
    assert sorted(task for one in calls for task in one["requeued"]) == sorted(good)
    monkeypatch.setattr(module, "LOOKED_MAX", 3)  # most of what failed may have been done over before
    again = walk(client, 200)
    assert [len(one["refused"]) for one in again] == [3, 2, 0] and not any(one["requeued"] for one in again)


def test_what_fails_again_meanwhile_is_for_another_time(
    client: FlaskClient, worker: FakeWorker, failed: Sequence[str]
) -> None:
    first = clear(client, "requeue", limit=4).get_json()
    for task in worker.take(9):
        worker.fail(task)
    rest = clear(client, "requeue", cursor=first["next_cursor"]).get_json()
    assert [len(one["requeued"]) for one in (first, rest)] == [4, 1] and not rest["more"]
    assert len(clear(client, "requeue").get_json()["requeued"]) == 4


def test_what_was_purged_meanwhile_ends_no_walk(client: FlaskClient, failed: Sequence[str]) -> None:
    first = clear(client, "requeue", limit=2, tenant="acme").get_json()
    assert clear(client, "purge", tenant="acme").get_json()["purged"] == 3
    rest = clear(client, "requeue", cursor=first["next_cursor"]).get_json()
    assert {one["task_id"] for one in rest["requeued"]} == set(failed[3:]) and not rest["more"]


def test_a_place_that_no_answer_gave_is_refused(client: FlaskClient, failed: Sequence[str]) -> None:
    for cursor in ("x", "1/2", "a/b/c", "1//c", "1/b/" + "c" * 65, 7):
        answer = clear(client, "requeue", cursor=cursor)
        assert answer.status_code == 422 and answer.get_json()["errors"][0]["loc"] == "cursor"


def test_a_task_that_came_with_a_key_is_done_over_under_it(
    client: FlaskClient, broker: Broker, worker: FakeWorker, redis_server: RedisServer
) -> None:
    key, admin = new_key(broker, max_queued=1), bearer(new_key(broker, "operators", admin=True))
    for _ in range(2):
        assert client.post("/api/submit", json={"prompt": "x"}, headers=bearer(key)).status_code == 202
        worker.fail(worker.take()[0])
    done = client.post("/api/failed/requeue", json={}, headers=admin).get_json()["requeued"]
    assert len(done) == 2, "its max_queued does not hold up an operator"
    for one in done:
        assert redis_server.client.hget(f"zf:task:{one['new_task_id']}", "key") == key.split("_")[1]


def test_a_purge_leaves_nothing(
    client: FlaskClient, broker: Broker, settings: Settings, redis_server: RedisServer, failed: Sequence[str]
) -> None:
    storage = open_storage(settings)
    left = [f"{attempt_folder('w1', task, 1, datetime.now(UTC).date())}/0.webp" for task in failed]
    for key in left:
        storage.put(key, b"x")
    assert in_rq(redis_server, "acme") == set(failed[:3])
    for _ in range(3):  # a gateway answers repeated polls from memory
        assert client.get(f"/api/status/{failed[0]}").status_code == 200
    assert clear(client, "purge", limit=3).get_json() == {"purged": 3, "more": True}
    assert clear(client, "purge", limit=3).get_json() == {"purged": 2, "more": False}
    assert clear(client, "purge").get_json() == {"purged": 0, "more": False}
    for task_id in failed:
        assert client.get(f"/api/status/{task_id}").status_code == 404
    assert client.get("/api/tasks?tenant=*").get_json()["tasks"] == []
    assert in_rq(redis_server, "acme") == in_rq(redis_server, "other") == set()
    assert not any(storage.exists(key) for key in left)
    names = [name for name in redis_server.client.scan_iter() if any(task in name for task in failed)]
    assert names == [], "nor of their webhooks"
    for name in redis_server.client.scan_iter():
        kind = redis_server.client.type(name)
        members = {"zset": ("zrange", 0, -1), "list": ("lrange", 0, -1), "set": ("smembers",)}.get(str(kind))
        if members:
            found = getattr(redis_server.client, members[0])(name, *members[1:])
            assert not [one for one in found if any(task in one for task in failed)], name


def test_a_purge_takes_what_expired_and_forged_jobs_and_nothing_else(
    client: FlaskClient, broker: Broker, worker: FakeWorker, submit: SubmitFn, redis_server: RedisServer
) -> None:
    late = submit(deadline_s=0.001)
    eventually(broker.expire)
    redis_server.client.rpush("rq:queue:simulated.normal.default", "forged")
    redis_server.client.hset("rq:job:forged", "data", "x")
    done = submit()
    worker.work()
    canceled, waits = submit(), submit()
    broker.cancel(canceled, None)
    assert in_rq(redis_server, "default") == {late, "forged"}
    assert clear(client, "purge").get_json() == {"purged": 2, "more": False}
    assert in_rq(redis_server, "default") == set()
    assert not redis_server.client.exists("rq:job:forged")
    statuses = {task: client.get(f"/api/status/{task}").status_code for task in (late, done, canceled, waits)}
    assert statuses == {late: 404, done: 200, canceled: 200, waits: 200}


def test_they_are_for_admins_and_their_fields_are_checked(client: FlaskClient, broker: Broker) -> None:
    for what in ("requeue", "purge"):
        for batch in ({"limit": 0}, {"limit": 201}, {"tenant": "A b"}, {"state": "failed"}, {"limit": True}):
            assert clear(client, what, **batch).status_code == 422
    key = new_key(broker)
    for what in ("requeue", "purge"):
        assert client.post(f"/api/failed/{what}", json={}, headers=bearer(key)).status_code == 403
