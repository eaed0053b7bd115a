"""What belongs to one tenant is to another exactly what does not exist, on every route."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI
from werkzeug.test import TestResponse

from common import inputs, registry
from common.broker import Broker
from common.settings import Settings
from gateway import dialects, submission
from gateway.app import close, create_app
from tests.samples import encoded
from tests.tenants import bearer, new_key
from tests.unit.gateway.fake_worker import FakeWorker

UNKNOWN = "0123456789abcdef" * 2
NOBODYS = {
    "/docs/assets/<path:name>",
    "/web/<path:name>",
    "/v1/models/<model>",
    "/api/workers/<name>/drain",
    "/api/workers/<name>/resume",
    "/api/workers/<name>/restart",
    "/api/keys/<key_id>/revoke",
    "/api/keys/<key_id>/rotate",
}  # rules with a part that names nothing of a tenant's
CALLS: dict[str, list[tuple[str, str, dict[str, str]]]] = {
    "/api/status/<task_id>": [
        ("GET", "", {}),
        ("GET", "?wait=0.1", {}),
        ("GET", "?wait=x", {}),
        ("GET", "", {"If-None-Match": "*"}),
    ],
    "/api/cancel/<task_id>": [("POST", "", {})],
    "/api/tasks/<task_id>/retry": [("POST", "", {})],
    "/api/tasks/<task_id>/events": [("GET", "", {}), ("GET", "", {"Last-Event-ID": "ended"})],
    "/api/tasks/<task_id>/thumbnail": [("GET", "", {}), ("GET", "", {"If-None-Match": "*"})],
    "/view/<task_id>/<name>": [("GET", "", {}), ("GET", "?expires=99999999999&signature=0", {})],
}


@pytest.fixture
def app(settings: Settings, broker: Broker) -> Iterator[OpenAPI]:
    """A gateway that speaks every dialect."""
    app = create_app(settings.model_copy(update={"dialects": registry.discover(dialects)}), broker)
    yield app
    close(app)


@pytest.fixture
def acme(broker: Broker) -> dict[str, str]:
    return bearer(new_key(broker))


@pytest.fixture
def other(broker: Broker) -> dict[str, str]:
    return bearer(new_key(broker, "other"))


def submit(client: FlaskClient, key: dict[str, str], **fields: object) -> TestResponse:
    return client.post("/api/submit", json={"prompt": "x", "model": "simulated"} | fields, headers=key)


def sealed(answer: TestResponse) -> tuple[object, ...]:
    """All of an answer but its request id."""
    headers = [(name, value) for name, value in answer.headers if name != "X-Request-ID"]
    return answer.status, headers, answer.data


def test_every_route_with_something_in_its_path_is_looked_at(app: OpenAPI) -> None:
    rules = {str(rule) for rule in app.url_map.iter_rules() if rule.arguments}
    assert rules - NOBODYS == CALLS.keys(), "add a call to it, or say why it needs none"


def states(worker: FakeWorker) -> dict[str, Callable[[str], None]]:
    def run(_: str) -> None:
        worker.take()

    def succeed(_: str) -> None:
        worker.work()

    def cancel(task_id: str) -> None:
        worker.broker.cancel(task_id, None)

    return {"queued": lambda _: None, "running": run, "succeeded": succeed, "canceled": cancel}


@pytest.mark.parametrize("state", ["queued", "running", "succeeded", "canceled"])
@pytest.mark.parametrize("rule", sorted(CALLS))
def test_anothers_task_is_an_unknown_one(
    client: FlaskClient,
    worker: FakeWorker,
    acme: dict[str, str],
    other: dict[str, str],
    rule: str,
    state: str,
) -> None:
    task_id = str(submit(client, acme).get_json()["task_id"])
    states(worker)[state](task_id)
    for _ in range(3):  # what a gateway remembers of its answers is its owner's, too
        assert client.get(f"/api/status/{task_id}", headers=acme).status_code == 200
    for method, query, headers in CALLS[rule]:
        answers = []
        for asked in (task_id, UNKNOWN):
            path = re.sub("<[^>]*>", "0.webp", rule.replace("<task_id>", asked)) + query
            answers.append(client.open(path, method=method, headers=other | headers))
        assert sealed(answers[0]) == sealed(answers[1])
        assert b"acme" not in answers[0].data
    record = worker.broker.view(task_id)
    assert record is not None
    assert (record.status, record.cancel_requested) == (state, False)


def test_a_list_is_a_tenants_own_whatever_cursor_it_is_asked_with(
    client: FlaskClient, acme: dict[str, str], other: dict[str, str]
) -> None:
    for _ in range(3):
        submit(client, acme)
    own = submit(client, other).get_json()["task_id"]
    cursor = client.get("/api/tasks?limit=1", headers=acme).get_json()["next_cursor"]
    assert [task["task_id"] for task in client.get("/api/tasks", headers=other).get_json()["tasks"]] == [own]
    page = client.get(f"/api/tasks?cursor={cursor}", headers=other).get_json()
    assert {task["task_id"] for task in page["tasks"]} <= {own}


def test_an_idempotency_key_is_a_tenants_own(client: FlaskClient, acme: dict[str, str], other: dict[str, str]) -> None:
    again = {"Idempotency-Key": "order-1"}
    first, repeated = (submit(client, acme | again).get_json()["task_id"] for _ in range(2))
    theirs = submit(client, other | again, seed=5)
    assert first == repeated != theirs.get_json()["task_id"]
    assert theirs.status_code == 202, "another body is no conflict, as it is another key"


def test_two_keys_of_one_tenant_see_the_same(client: FlaskClient, broker: Broker, acme: dict[str, str]) -> None:
    task_id = submit(client, acme).get_json()["task_id"]
    assert client.get(f"/api/status/{task_id}", headers=bearer(new_key(broker))).status_code == 200


def test_a_task_id_has_128_random_bits() -> None:
    ids = [submission.new_task_id() for _ in range(2000)]
    assert all(re.fullmatch("[0-9a-f]{32}", task_id) for task_id in ids)
    ones = [sum(int(task_id, 16) >> bit & 1 for task_id in ids) for bit in range(128)]
    assert all(800 < count < 1200 for count in ones), "each bit is either, as often as not"


def upload(client: FlaskClient, key: dict[str, str]) -> str:
    answer = client.post("/api/images", data=encoded(), content_type="image/png", headers=key)
    return str(answer.get_json()["handle"])


def test_anothers_picture_is_an_unknown_one(client: FlaskClient, acme: dict[str, str], other: dict[str, str]) -> None:
    handle = upload(client, acme)
    made_up = inputs.new_handle("other")
    moved = handle[:-8] + made_up[-8:]
    for start in ({"init_image": handle}, {"reference_images": [handle]}):
        assert submit(client, acme, **start).status_code == 202
    for field in ("init_image", "mask_image", "control_image", "reference_images"):
        asked = [
            submit(client, other, **{field: [name] if field == "reference_images" else name})
            for name in (handle, made_up, moved, f"img_{UNKNOWN}")
        ]
        assert asked[0].status_code == 422
        assert len({repr(sealed(answer)) for answer in asked}) == 1


def test_a_handle_is_told_from_others_by_itself() -> None:
    handle = inputs.new_handle("acme")
    assert inputs.is_handle(handle)
    assert inputs.belongs(handle, "acme")
    assert not inputs.belongs(handle, "acm")
    assert not inputs.belongs(handle, "default")
    assert not inputs.belongs("acme", "acme")
