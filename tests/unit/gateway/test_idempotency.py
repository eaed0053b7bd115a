"""The same Idempotency-Key and body is the same task for 24 hours, whatever has become of it or of the fleet since."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from common import keys
from common.apikeys import ApiKey, Token
from common.broker import Broker
from common.records import Hold
from common.settings import Settings
from common.storage import open_storage
from gateway.app import create_app
from tests.samples import encoded
from tests.servers import RedisServer
from tests.unit.gateway.fake_worker import FakeWorker

DAY_S = 24 * 3600


def send(client: FlaskClient, *, key: str = "k", api_key: str = "", **fields: Any) -> TestResponse:
    headers = {"Idempotency-Key": key} | ({"X-API-Key": api_key} if api_key else {})
    return client.post("/api/submit", json={"prompt": "x"} | fields, headers=headers)


def made(answer: TestResponse) -> dict[str, Any]:
    assert answer.status_code == 202, answer.text
    return dict(answer.get_json())


def refused(answer: TestResponse) -> tuple[int, str]:
    return answer.status_code, answer.get_json(force=True)["code"]


@pytest.fixture
def own_key(broker: Broker) -> Callable[..., str]:
    """Make a key of a tenant."""

    def make(tenant: str, **bounds: Any) -> str:
        token = Token.new()
        now = datetime.now(UTC)
        broker.put_key(ApiKey(key_id=token.key_id, tenant=tenant, digest=token.digest, created_at=now, **bounds))
        return str(token)

    return make


# What has become of the task


def running(client: FlaskClient, worker: FakeWorker, task_id: str) -> None:
    worker.take()


def succeeded(client: FlaskClient, worker: FakeWorker, task_id: str) -> None:
    worker.work()


def failed(client: FlaskClient, worker: FakeWorker, task_id: str) -> None:
    worker.fail(*worker.take())


def canceled(client: FlaskClient, worker: FakeWorker, task_id: str) -> None:
    client.post(f"/api/cancel/{task_id}")


def expired(client: FlaskClient, worker: FakeWorker, task_id: str) -> None:
    time.sleep(0.25)


@pytest.mark.parametrize("fate", [running, succeeded, failed, canceled, expired], ids=lambda fate: fate.__name__)
def test_a_repeated_submit_is_told_of_its_task_as_it_now_is(
    client: FlaskClient, broker: Broker, worker: FakeWorker, fate: Callable[[FlaskClient, FakeWorker, str], None]
) -> None:
    worker.beat()
    deadline = {"deadline_s": 0.2} if fate is expired else {}
    first = made(send(client, **deadline))
    fate(client, worker, first["task_id"])
    answer = send(client, **deadline)
    assert made(answer) == first | {"status": fate.__name__, "position": None, "eta_seconds": None}
    assert answer.headers["Location"] == first["status_url"]
    assert refused(send(client, prompt="other")) == (409, "idempotency_conflict")
    assert broker.pending() == (fate is running)


def test_a_task_in_line_is_told_with_its_place(client: FlaskClient, worker: FakeWorker) -> None:
    places = [made(send(client, key=key))["position"] for key in "abc"]
    worker.take()
    again = [made(send(client, key=key)) for key in "abc"]
    assert places == [0, 1, 2]
    assert [(one["status"], one["position"]) for one in again] == [("running", None), ("queued", 0), ("queued", 1)]


def test_a_result_past_its_retention_is_gone_and_its_record_makes_room(
    client: FlaskClient, worker: FakeWorker, redis_server: RedisServer
) -> None:
    first = made(send(client))["task_id"]
    worker.work()
    redis_server.client.hset(keys.TASK + first, "expires_at", int(time.time() * 1000) - 1)
    assert refused(send(client)) == (410, "task_expired")
    redis_server.client.delete(keys.TASK + first)
    second = made(send(client, prompt="other"))["task_id"]
    assert second != first
    assert made(send(client, prompt="other"))["task_id"] == second
    assert refused(send(client)) == (409, "idempotency_conflict")


# Who and for how long


def test_a_key_is_known_for_24_hours_from_its_first_submit(client: FlaskClient, redis_server: RedisServer) -> None:
    first = made(send(client))["task_id"]
    (name,) = redis_server.client.keys(keys.IDEMPOTENCY + "*")
    assert DAY_S - 10 < redis_server.client.ttl(name) <= DAY_S
    redis_server.client.expire(name, 100)
    assert made(send(client))["task_id"] == first
    assert refused(send(client, prompt="other")) == (409, "idempotency_conflict")
    assert redis_server.client.ttl(name) <= 100
    redis_server.client.delete(name)
    assert made(send(client))["task_id"] != first


def test_the_key_itself_is_nowhere_on_redis(client: FlaskClient, redis_server: RedisServer) -> None:
    made(send(client, key="not-to-be-read"))
    for name in redis_server.client.scan_iter():
        kind = redis_server.client.type(name)
        value = redis_server.client.hgetall(name) if kind == "hash" else ""
        assert "not-to-be-read" not in f"{name} {value}"


def test_each_tenant_has_keys_of_its_own(client: FlaskClient, own_key: Callable[..., str]) -> None:
    acme, also_acme, other = own_key("acme"), own_key("acme"), own_key("umbrella")
    first = made(send(client, api_key=acme))["task_id"]
    assert made(send(client, api_key=also_acme))["task_id"] == first, "an API key that was rotated in between"
    assert refused(send(client, api_key=also_acme, prompt="other")) == (409, "idempotency_conflict")
    theirs = made(send(client, api_key=other, prompt="other"))["task_id"]
    assert theirs != first
    assert made(send(client, api_key=other, prompt="other"))["task_id"] == theirs


# What counts as the same


def test_a_default_that_is_spelled_out_is_the_same_body(client: FlaskClient) -> None:
    first = made(send(client))["task_id"]
    assert made(send(client, n=1, priority="normal", metadata={}, webhook=None))["task_id"] == first
    assert refused(send(client, n=2)) == (409, "idempotency_conflict")
    assert refused(send(client, seed=0)) == (409, "idempotency_conflict")


def test_a_number_is_the_same_however_it_is_written(client: FlaskClient) -> None:
    assert len({made(send(client, guidance_scale=scale))["task_id"] for scale in (2, 2.0)}) == 1


# What holds new ones up


def test_a_full_queue_refuses_new_ones_alone(settings: Settings) -> None:
    tight = settings.model_copy(update={"queue_cap": 1})
    client = create_app(tight, Broker(tight)).test_client()
    first = made(send(client))
    assert refused(send(client, key="new")) == (429, "queue_full")
    assert made(send(client)) == first


def test_a_quota_that_is_used_up_refuses_new_ones_alone(client: FlaskClient, own_key: Callable[..., str]) -> None:
    api_key = own_key("acme", max_queued=1)
    first = made(send(client, api_key=api_key))
    assert refused(send(client, api_key=api_key, key="new")) == (429, "quota_used_up")
    assert made(send(client, api_key=api_key))["task_id"] == first["task_id"]
    assert refused(send(client, api_key=api_key, prompt="other")) == (409, "idempotency_conflict")


def test_a_deadline_that_would_be_missed_by_now_refuses_new_ones_alone(client: FlaskClient, worker: FakeWorker) -> None:
    worker.beat()
    made(send(client, key="before"))
    worker.work()  # which tells how long a task takes
    asked: dict[str, Any] = {"deadline_s": 2.0, "reject_if_late": True}
    first = made(send(client, **asked))
    for key in range(100):
        made(send(client, key=f"before-{key}", priority="high"))
    assert refused(send(client, key="new", **asked)) == (503, "too_late")
    assert made(send(client, **asked))["task_id"] == first["task_id"]


def test_a_refused_submit_leaves_its_key_unused(settings: Settings) -> None:
    tight = settings.model_copy(update={"queue_cap": 1})
    client = create_app(tight, Broker(tight)).test_client()
    client.post(made(send(client, key="first"))["cancel_url"])
    assert refused(send(client, width=7)) == (422, "invalid_request")
    blocker = made(send(client, key="second"))
    assert refused(send(client)) == (429, "queue_full")
    client.post(blocker["cancel_url"])
    made(send(client, prompt="another body than the refused ones"))


def test_workers_that_could_not_do_it_by_now_change_nothing(
    client: FlaskClient, worker: FakeWorker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.fleetview.LIMITS_TTL_S", 0.0)
    picture = base64.b64encode(encoded()).decode()
    first = made(send(client, width=64, height=64, init_image=picture))
    worker.beat(max_pixels={"simulated": 16 * 16, "pico": 16 * 16})
    before = sorted(settings.data_dir.rglob("*.png"))
    assert made(send(client, width=64, height=64, init_image=picture)) == first
    assert refused(send(client, key="new", width=64, height=64, init_image=picture)) == (422, "invalid_request")
    assert refused(send(client, width=64, height=80, init_image=picture)) == (409, "idempotency_conflict")
    assert sorted(settings.data_dir.rglob("*.png")) == before


def test_a_submit_whose_reply_got_lost_keeps_its_pictures(
    client: FlaskClient, broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = broker.submit
    monkeypatch.setattr(broker, "submit", lambda task, **options: (once(task, **options), once(task, **options))[1])
    picture = base64.b64encode(encoded()).decode()
    for key in ("k", "l"):
        record = broker.view(made(send(client, key=key, init_image=picture))["task_id"])
        assert record is not None and record.request.init_image is not None
    stored = sorted(path.stem for path in settings.data_dir.rglob("*.png"))
    assert len(stored) == 2


def test_a_run_that_is_given_back_is_still_the_same_task(
    client: FlaskClient, broker: Broker, settings: Settings
) -> None:
    first = made(send(client))
    worker = FakeWorker(broker, open_storage(settings))
    (task,) = worker.take()
    broker.release(worker.name, Hold(task.task_id, task.fence))
    assert made(send(client)) == first
