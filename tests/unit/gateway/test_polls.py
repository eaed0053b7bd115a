"""Polls that ask whether anything is new: ETags, 304, and the memory in front of Flask that answers most of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from flask.testing import FlaskClient
from structlog.testing import capture_logs
from werkzeug.test import TestResponse

from common.apikeys import ApiKey, Token
from common.broker import Broker
from common.records import Hold
from common.settings import Settings
from gateway import admission, polls, requestlog
from gateway.app import TASKS, create_app
from gateway.dialects import native
from gateway.polls import Polls
from gateway.waiting import Hub
from tests.servers import eventually
from tests.unit.gateway.fake_worker import FakeWorker


class Reads:
    """Counts how often a task is really looked at."""

    def __init__(self, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        view = broker.view

        def counted(task_id: str) -> Any:
            self.count += 1
            return view(task_id)

        monkeypatch.setattr(broker, "view", counted)


@pytest.fixture
def reads(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(broker, monkeypatch)


@pytest.fixture
def patient(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlaskClient]:
    """A client of a gateway that hears everything, and remembers for longer than a slow machine takes for a test."""
    monkeypatch.setattr(polls, "GOOD_S", 60.0)
    client.get("/api/status/x")
    eventually(lambda: hub(client).hears_all)
    yield client
    client.application.extensions[TASKS].close()


def hub(client: FlaskClient) -> Hub:
    found: Hub = client.application.extensions[TASKS].hub
    return found


def submit(client: FlaskClient, **fields: Any) -> str:
    return str(client.post("/api/submit", json={"prompt": "a red circle", "steps": 4, **fields}).get_json()["task_id"])


def poll(client: FlaskClient, task_id: str, known: str = "", **headers: str) -> TestResponse:
    return client.get(f"/api/status/{task_id}", headers={**({"If-None-Match": known} if known else {}), **headers})


# ETags


def test_an_answer_has_a_weak_etag_and_is_stored_nowhere(client: FlaskClient) -> None:
    answer = poll(client, submit(client))
    assert answer.headers["ETag"].startswith('W/"') and answer.headers["Cache-Control"] == "no-store"


def test_nothing_new_is_told_without_a_body(client: FlaskClient) -> None:
    task_id = submit(client)
    known = poll(client, task_id).headers["ETag"]
    for sent in (known, known.removeprefix("W/"), f'"other", {known}', "*"):
        answer = poll(client, task_id, sent)
        assert (answer.status_code, answer.data, answer.headers["ETag"]) == (304, b"", known)
        assert answer.headers["Cache-Control"] == "no-store" and answer.headers["X-Request-ID"]
        assert "Content-Type" not in answer.headers
    for sent in ('W/"other"', "x", '"', '", W/'):
        assert poll(client, task_id, sent).status_code == 200
    assert client.get(f"/api/status/{task_id}?wait=0.1", headers={"If-None-Match": known}).status_code == 304


def test_whatever_a_client_could_miss_is_another_etag(client: FlaskClient, broker: Broker, worker: FakeWorker) -> None:
    first, task_id = submit(client), submit(client, preview=True)
    seen: list[str] = []

    def changed() -> None:
        seen.append(client.get(f"/api/status/{task_id}?wait=0").headers["ETag"])  # looked at anew, however slow this is

    changed()
    client.post(f"/api/cancel/{first}")  # position
    changed()
    (task,) = worker.take()
    changed()
    worker.step(task, 1)
    changed()
    broker.progress("w1", {Hold(task_id, task.fence): (1, 4)}, {Hold(task_id, task.fence): "b2xk"})
    changed()
    broker.release("w1", Hold(task_id, task.fence))
    changed()
    (task,) = worker.take()
    worker.succeed(task)
    changed()
    assert len(set(seen)) == len(seen)


def test_an_estimate_that_is_as_good_as_the_same_is_no_news(client: FlaskClient) -> None:
    view = native.render(client.application.extensions[TASKS].find(submit(client), admission.OPEN))

    def tag(eta: float | None) -> str:
        return native.etag(view.model_copy(update={"eta_seconds": eta}))

    assert tag(100.0) == tag(101.0) != tag(130.0)
    assert tag(0.1) == tag(0.9)
    assert tag(None) != tag(1.0)


# The memory


def test_a_repeated_poll_is_answered_from_memory(patient: FlaskClient, reads: Reads) -> None:
    task_id = submit(patient)
    first = poll(patient, task_id)
    ids = {first.headers["X-Request-ID"]}
    for _ in range(5):
        told = poll(patient, task_id, first.headers["ETag"])
        ids.add(told.headers["X-Request-ID"])
        assert (told.status_code, told.data, told.headers["ETag"]) == (304, b"", first.headers["ETag"])
        assert told.headers["Cache-Control"] == "no-store"
    assert reads.count == 1 and len(ids) == 6


def test_whoever_knows_another_state_or_none_has_it_looked_at(patient: FlaskClient, reads: Reads) -> None:
    task_id = submit(patient)
    for looks, known in enumerate(("", "", 'W/"older"', ""), start=1):
        assert poll(patient, task_id, known).get_json()["task_id"] == task_id
        assert reads.count == looks


@pytest.mark.parametrize("what", ["running", "progress", "released", "failed", "canceled"])
def test_anything_that_is_heard_of_a_task_makes_it_looked_at_again(
    patient: FlaskClient, broker: Broker, worker: FakeWorker, reads: Reads, what: str
) -> None:
    task_id = submit(patient)
    hold = Hold(task_id, 1)
    if what in ("progress", "released", "failed"):
        worker.take()
        time.sleep(0.2)  # until that has been heard
    known, before = poll(patient, task_id).headers["ETag"], reads.count
    happen: dict[str, Callable[[], object]] = {
        "running": worker.take,
        "canceled": lambda: broker.cancel(task_id, None),
        "progress": lambda: broker.progress("w1", {hold: (2, 4)}),
        "released": lambda: broker.release("w1", hold),
        "failed": lambda: broker.finish("w1", hold, "failed"),
    }
    happen[what]()
    eventually(lambda: poll(patient, task_id, known).status_code == 200, within_s=2)
    assert reads.count > before


def test_ones_own_cancel_is_seen_at_once(patient: FlaskClient) -> None:
    for _ in range(20):
        task_id = submit(patient)
        known = poll(patient, task_id).headers["ETag"]
        patient.post(f"/api/cancel/{task_id}")
        answer = poll(patient, task_id, known)
        assert (answer.status_code, answer.get_json()["status"]) == (200, "canceled")


def test_what_happens_during_a_look_is_not_covered_by_it(
    patient: FlaskClient, broker: Broker, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = submit(patient)
    view = broker.view

    def overtaken(one: str) -> Any:
        found = view(one)
        worker.take()
        eventually(lambda: task_id not in front(patient)._memos)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(broker, "view", overtaken)
        answer = poll(patient, task_id)
    assert answer.get_json()["status"] == "queued"
    assert poll(patient, task_id, answer.headers["ETag"]).get_json()["status"] == "running"


def test_it_is_kept_for_a_second_as_places_in_line_move_in_silence(client: FlaskClient, reads: Reads) -> None:
    first, task_id = submit(client), submit(client)
    poll(client, task_id)
    eventually(lambda: hub(client).hears_all)
    poll(client, task_id)
    client.post(f"/api/cancel/{first}")
    eventually(lambda: poll(client, task_id).get_json()["position"] == 0, within_s=3)
    client.application.extensions[TASKS].close()


def test_without_a_subscription_to_everything_nothing_is_remembered(
    client: FlaskClient, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "hears_all", property(lambda _self: False, lambda _self, _value: None), raising=False)
    task_id = submit(client)
    for _ in range(3):
        assert poll(client, task_id).status_code == 200
    assert reads.count == 3


def test_a_subscription_that_stands_anew_begins_with_nothing(patient: FlaskClient, reads: Reads) -> None:
    task_id = submit(patient)
    poll(patient, task_id)
    hub(patient)._doubt(False, stands=True)
    poll(patient, task_id)
    assert reads.count == 2


def test_other_calls_and_other_forms_of_this_one_take_their_usual_way(patient: FlaskClient, reads: Reads) -> None:
    task_id = submit(patient)
    known = poll(patient, task_id).headers["ETag"]
    assert patient.get(f"/api/status/{task_id}?wait=0", headers={"If-None-Match": known}).status_code == 304
    assert patient.head(f"/api/status/{task_id}").status_code == 200
    assert patient.post(f"/api/status/{task_id}").status_code == 405
    assert poll(patient, task_id + "/").status_code == 404
    assert reads.count == 3


def test_errors_are_not_remembered(patient: FlaskClient, reads: Reads) -> None:
    for _ in range(2):
        assert poll(patient, "0" * 32).status_code == 404
    assert reads.count == 2
    assert front(patient)._memos == {}


def test_an_answer_in_front_of_flask_has_its_line_in_the_log(patient: FlaskClient, reads: Reads) -> None:
    task_id = submit(patient)
    known = poll(patient, task_id).headers["ETag"]
    requestlog._log.cache_clear()
    with capture_logs() as logs:
        answer = poll(patient, task_id, known, **{"X-Request-ID": "r-1"})
    requestlog._log.cache_clear()
    assert reads.count == 1 and answer.headers.getlist("X-Request-ID") == ["r-1"]
    assert answer.headers.getlist("X-Content-Type-Options") == ["nosniff"]
    (line,) = logs
    assert (line["request_id"], line["method"], line["status"]) == ("r-1", "GET", 304)
    assert (line["route"], line["task_id"]) == ("/api/status/<task_id>", task_id)


def test_its_memory_is_bounded(patient: FlaskClient, monkeypatch: pytest.MonkeyPatch, reads: Reads) -> None:
    monkeypatch.setattr(polls, "MOST_TASKS", 3)
    for _ in range(10):
        poll(patient, submit(patient))
        assert len(front(patient)._memos) <= 3


def front(client: FlaskClient) -> Polls:
    log: Any = client.application.wsgi_app
    found: Polls = log._app
    return found


# Who asks


class Tenants:
    """A gateway that keys were made for."""

    def __init__(self, settings: Settings, broker: Broker) -> None:
        self.broker = broker
        self.keys: dict[str, ApiKey] = {}
        self.client = create_app(settings, broker).test_client()

    def key(self, tenant: str, **fields: Any) -> str:
        token = Token.new()
        key = ApiKey(key_id=token.key_id, digest=token.digest, tenant=tenant, created_at=datetime.now(UTC), **fields)
        self.broker.put_key(key)
        self.keys[str(token)] = key
        return str(token)

    def revoke(self, token: str) -> None:
        self.broker.put_key(self.keys[token].model_copy(update={"revoked_at": datetime.now(UTC)}))

    def submit(self, token: str) -> str:
        answer = self.client.post("/api/submit", json={"prompt": "a red circle"}, headers={"X-API-Key": token})
        return str(answer.get_json()["task_id"])

    def poll(self, task_id: str, token: str, known: str = "") -> TestResponse:
        return poll(self.client, task_id, known, Authorization=f"Bearer {token}")


@pytest.fixture
def tenants(settings: Settings, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tenants]:
    monkeypatch.setattr(polls, "GOOD_S", 60.0)
    tenants = Tenants(settings, broker)
    tenants.poll("x", tenants.key("a"))
    eventually(lambda: hub(tenants.client).hears_all)
    yield tenants
    tenants.client.application.extensions[TASKS].close()


def test_only_who_may_see_a_task_is_answered_from_memory(tenants: Tenants, reads: Reads) -> None:
    mine, also_mine, others = tenants.key("a"), tenants.key("a"), tenants.key("b")
    task_id = tenants.submit(mine)
    known = tenants.poll(task_id, mine).headers["ETag"]
    assert tenants.poll(task_id, mine, known).status_code == 304
    by_another_name = {"X-API-Key": mine, "If-None-Match": known}
    assert tenants.client.get(f"/api/status/{task_id}", headers=by_another_name).status_code == 304
    assert reads.count == 1
    assert tenants.poll(task_id, others, known).status_code == 404
    assert tenants.poll(task_id, "zfk_0_0", known).status_code == 401
    assert poll(tenants.client, task_id, known).status_code == 401
    for _ in range(2):  # the first makes the key known
        assert tenants.poll(task_id, also_mine, known).status_code == 304


def test_who_has_no_key_makes_nobody_listen(settings: Settings, broker: Broker) -> None:
    strangers = Tenants(settings, broker)
    key = strangers.key("a")
    task_id = strangers.submit(key)
    assert {strangers.poll(task_id, "zfk_0_0").status_code, poll(strangers.client, task_id).status_code} == {401}
    assert not hub(strangers.client)._threads
    assert strangers.poll(task_id, key).status_code == 200
    eventually(lambda: hub(strangers.client).hears_all)
    strangers.client.application.extensions[TASKS].close()


def test_an_admin_is_answered_as_one(tenants: Tenants, reads: Reads) -> None:
    mine, admin = tenants.key("a"), tenants.key("ops", admin=True)
    task_id = tenants.submit(mine)
    for _ in range(2):
        for token in (admin, mine):
            known = tenants.poll(task_id, token).headers["ETag"]
    for _ in range(3):
        assert tenants.poll(task_id, mine, known).status_code == 304
    assert reads.count == 4


def test_a_revoked_key_is_refused_within_its_two_seconds(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "KNOWN_S", 0.3)
    mine = tenants.key("a")
    task_id = tenants.submit(mine)
    known = tenants.poll(task_id, mine).headers["ETag"]
    assert tenants.poll(task_id, mine, known).status_code == 304
    tenants.revoke(mine)
    eventually(lambda: tenants.poll(task_id, mine, known).status_code == 401, within_s=3)


def test_who_shows_no_key_is_answered_only_where_none_was_ever_made(
    patient: FlaskClient, broker: Broker, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "KNOWN_S", 0.3)
    task_id = submit(patient)
    known = poll(patient, task_id).headers["ETag"]
    assert poll(patient, task_id, known).status_code == 304
    assert poll(patient, task_id, known, **{"X-Forwarded-For": "203.0.113.9"}).status_code == 401
    token = Token.new()
    broker.put_key(ApiKey(key_id=token.key_id, digest=token.digest, tenant="a", created_at=datetime.now(UTC)))
    eventually(lambda: poll(patient, task_id, known).status_code == 401, within_s=3)
