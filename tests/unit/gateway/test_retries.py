"""Tasks done over: the same request once more, once, by whoever may."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from common import inputs
from common.broker import Broker
from common.settings import Settings
from common.storage import open_storage
from gateway import submission
from gateway.app import create_app
from gateway.retries import retry_id
from tests.samples import encoded
from tests.tenants import bearer, new_key
from tests.unit.gateway.fake_worker import FakeWorker


def submit(client: FlaskClient, **fields: object) -> str:
    answer = client.post("/api/submit", json={"prompt": "a red circle"} | fields)
    assert answer.status_code == 202, answer.text
    return str(answer.get_json()["task_id"])


def retry(client: FlaskClient, task_id: str, key: str = "") -> TestResponse:
    return client.post(f"/api/tasks/{task_id}/retry", headers=bearer(key) if key else {})


def refusal(answer: TestResponse) -> tuple[int, str]:
    return answer.status_code, answer.get_json()["code"]


def fail(worker: FakeWorker) -> None:
    (task,) = worker.take()
    worker.fail(task)


def ways(client: FlaskClient, worker: FakeWorker) -> dict[str, Callable[[str], object]]:
    return {
        "failed": lambda _: fail(worker),
        "canceled": lambda task_id: client.post(f"/api/cancel/{task_id}"),
        "expired": lambda _: worker.broker.expire(),
    }


@pytest.mark.parametrize("state", ["failed", "canceled", "expired"])
def test_it_is_a_new_task_with_the_same_request(client: FlaskClient, worker: FakeWorker, state: str) -> None:
    fields = {"n": 2, "steps": 3, "metadata": {"a": "b"}, "width": 64, "height": 80, "priority": "low"}
    task_id = submit(client, **fields, **({"deadline_s": 1e-3} if state == "expired" else {}))
    ways(client, worker)[state](task_id)
    old = client.get(f"/api/status/{task_id}").get_json()
    assert old["status"] == state
    answer = retry(client, task_id)
    new_id = answer.get_json()["task_id"]
    assert (answer.status_code, answer.headers["Location"]) == (202, f"/api/status/{new_id}")
    assert new_id != task_id and len(new_id) == len(submission.new_task_id())
    new = client.get(f"/api/status/{new_id}").get_json()
    assert new["request"] == old["request"] and new["retry_of"] == task_id
    assert client.get(f"/api/status/{task_id}").get_json() == old, "it stays as it is"
    listed = {one["task_id"]: one["retry_of"] for one in client.get("/api/tasks").get_json()["tasks"]}
    assert listed == {task_id: None, new_id: task_id}
    if state != "expired":
        assert worker.work() == new_id


def test_sent_twice_it_is_one_task(client: FlaskClient, worker: FakeWorker) -> None:
    task_id = submit(client)
    fail(worker)
    answers = [retry(client, task_id) for _ in range(2)]
    assert answers[0].get_json()["task_id"] == answers[1].get_json()["task_id"] == retry_id(task_id)
    worker.work()
    assert retry(client, task_id).get_json()["status"] == "succeeded", "and as it now is"
    assert len(client.get("/api/tasks").get_json()["tasks"]) == 2


def test_a_retry_that_fails_is_done_over_itself(client: FlaskClient, worker: FakeWorker) -> None:
    task_id = submit(client)
    ids = [task_id]
    for _ in range(2):
        fail(worker)
        ids.append(retry(client, ids[-1]).get_json()["task_id"])
    assert len(set(ids)) == 3


def test_what_goes_on_or_succeeded_is_not_done_over(client: FlaskClient, worker: FakeWorker) -> None:
    task_id = submit(client)
    assert refusal(retry(client, task_id)) == (409, "not_retryable")
    worker.work()
    assert refusal(retry(client, task_id)) == (409, "not_retryable")
    assert refusal(retry(client, "0" * 32)) == (404, "unknown_task")


def test_its_pictures_must_still_be_there(settings: Settings, broker: Broker, worker: FakeWorker) -> None:
    client = create_app(settings.model_copy(update={"models": ("simulated",)}), broker).test_client()
    handle = client.post("/api/images", data=encoded(), content_type="image/png").get_json()["handle"]
    task_id, other = (submit(client, init_image=handle) for _ in range(2))
    for _ in range(2):
        fail(worker)
    assert retry(client, task_id).status_code == 202
    open_storage(settings).delete(inputs.storage_key(handle))
    answer = retry(client, other)
    assert refusal(answer) == (410, "input_gone")
    assert "init_image" in answer.get_json()["detail"] and "send it again" in answer.get_json()["detail"]
    assert retry(client, task_id).status_code == 202, "what was accepted is found"


def test_it_counts_against_the_key_that_asks(client: FlaskClient, broker: Broker, worker: FakeWorker) -> None:
    good, limited, low = new_key(broker), new_key(broker, rate="1/h", max_queued=1), new_key(broker, priority_max="low")
    ids = []
    for _ in range(2):
        answer = client.post("/api/submit", json={"prompt": "x"}, headers=bearer(good))
        ids.append(answer.get_json()["task_id"])
        fail(worker)
    assert refusal(retry(client, ids[0], low)) == (422, "invalid_request")
    assert retry(client, ids[0], limited).headers["X-RateLimit-Remaining"] == "0"
    assert refusal(retry(client, ids[1], limited)) == (429, "rate_limited")
    quota = new_key(broker, max_queued=1)
    client.post("/api/submit", json={"prompt": "x"}, headers=bearer(quota))
    assert refusal(retry(client, ids[1], quota)) == (429, "quota_used_up")
    admin = new_key(broker, "operators", admin=True)
    new_id = retry(client, ids[1], admin).get_json()["task_id"]
    assert client.get(f"/api/status/{new_id}", headers=bearer(good)).status_code == 200, "it is its tenant's"


def test_what_the_fleet_no_longer_makes_is_refused(settings: Settings, broker: Broker, worker: FakeWorker) -> None:
    client = create_app(settings, broker).test_client()
    task_id = submit(client, model="simulated", width=512, height=512)
    fail(worker)
    without = create_app(settings.model_copy(update={"models": ("pico",)}), broker).test_client()
    assert refusal(retry(without, task_id)) == (422, "unknown_model")
    worker.beat(max_pixels={"simulated": 64 * 64, "pico": 64 * 64})
    smaller = create_app(settings, Broker(settings)).test_client()
    assert refusal(retry(smaller, task_id)) == (422, "invalid_request")
