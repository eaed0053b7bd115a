"""GET /api/fleet and its stream: one look for all who watch, none while nobody does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI

from common.broker import Broker
from common.errors import RedisUnavailable
from common.fleet import Fleet
from gateway import fleet
from gateway.app import WATCH, close
from tests.conftest import SubmitFn
from tests.servers import eventually
from tests.tenants import bearer, new_key, revoke
from tests.unit.gateway.fake_worker import FakeWorker


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks and silences that a test can wait for."""
    monkeypatch.setattr(fleet, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(fleet, "MOST_OF_A_CORE", 100.0)
    monkeypatch.setattr(fleet, "SILENCE_S", 0.1)


def lines(client: FlaskClient, **headers: str) -> Iterator[str]:
    """What a stream sends, line by line, without the empty ones."""
    answer = client.get("/api/fleet/events", headers=headers)
    assert answer.mimetype == "text/event-stream"
    for chunk in answer.response:
        text = chunk if isinstance(chunk, str) else chunk.decode()
        yield from (line for line in text.split("\n") if line)


def data(stream: Iterator[str]) -> Any:
    """The next event's data."""
    return json.loads(next(line for line in stream if line.startswith("data: ")).removeprefix("data: "))


def test_the_fleet_in_one_answer(client: FlaskClient, worker: FakeWorker, submit: SubmitFn) -> None:
    tasks = [submit(tenant=tenant) for tenant in ("acme", "acme", "other")]
    worker.name = "host.gpu0.abc"
    (task,) = worker.take()
    worker.step(task, 2)
    worker.beat(running=["gone"])
    found = Fleet.model_validate_json(client.get("/api/fleet").data)
    (line,) = found.queues
    assert (line.model, line.priority, line.queued, line.running) == ("simulated", "normal", 2, 1)
    assert line.oldest_age_seconds is not None and 0 <= line.oldest_age_seconds < 60
    (seen,) = found.workers
    (run,) = seen.runs
    assert (run.task_id, run.tenant, run.model, run.step, run.steps) == (task.task_id, "acme", "simulated", 2, 4)
    assert task.task_id in tasks and run.started_at <= found.at
    assert (seen.name, seen.drained, seen.running) == ("host.gpu0.abc", False, ["gone"])
    assert (found.health.status, found.health.workers, found.suspended) == ("healthy", 1, False)
    assert found.recent.window_seconds == 900


def test_what_is_done_to_the_fleet_shows(client: FlaskClient, broker: Broker, worker: FakeWorker) -> None:
    worker.beat(name="host.gpu0.abc")
    assert client.post("/api/fleet/pause").get_json() == {"suspended": True}
    assert client.get("/api/fleet").get_json()["suspended"] and broker.suspended()
    assert client.post("/api/fleet/resume").get_json() == {"suspended": False}
    for name in ("host.gpu0.abc", "host.gpu0"):
        drained = client.post(f"/api/workers/{name}/drain").get_json()
        assert drained == {**client.get("/api/fleet").get_json()["workers"][0], "drained": True}
        assert client.get("/api/workers").get_json()["workers"][0]["drained"]
        assert client.post(f"/api/workers/{name}/resume").get_json()["drained"] is False
    assert client.post("/api/workers/host.gpu0/restart").get_json()["name"] == "host.gpu0.abc"


def test_a_drained_slot_whose_worker_is_gone_shows_until_it_is_taken_off(
    client: FlaskClient, broker: Broker, worker: FakeWorker
) -> None:
    worker.beat(name="host.gpu0.abc")
    for name in ("host.gpu0.abc", "sold.gpu0.abc", "sold.gpu1.abc"):
        broker.drain(name)
    assert client.get("/api/fleet").get_json()["drained_away"] == ["sold.gpu0", "sold.gpu1"]
    for name, slot in (("sold.gpu0", "sold.gpu0"), ("sold.gpu1.abc", "sold.gpu1")):
        assert client.post(f"/api/workers/{name}/resume").get_json() == {"name": slot, "drained": False}
        assert client.post(f"/api/workers/{name}/resume").status_code == 404
    assert client.get("/api/fleet").get_json()["drained_away"] == []
    assert broker.drained() == {"host.gpu0"}, "which is there, and shows it itself"
    assert client.post("/api/workers/host.gpu0/resume").get_json() == {"name": "host.gpu0.abc", "drained": False}


@pytest.mark.parametrize("order", ["drain", "resume", "restart"])
def test_a_worker_that_is_not_there_is_unknown(client: FlaskClient, worker: FakeWorker, order: str) -> None:
    worker.beat(name="host.gpu1.lost", state="lost")
    for name in ("host.gpu0.abc", "host.gpu1", "host", "x"):
        answer = client.post(f"/api/workers/{name}/{order}")
        assert (answer.status_code, answer.get_json()["code"]) == (404, "unknown_worker")


def test_the_stream_tells_each_change_and_nothing_else(
    client: FlaskClient, worker: FakeWorker, submit: SubmitFn, quick: None
) -> None:
    worker.beat(name="host.gpu0.abc")
    stream = lines(client)
    assert next(stream) == "retry: 2000"
    assert data(stream)["queues"] == []
    assert next(stream) == ": still here"
    client.post("/api/fleet/pause")
    assert next(line for line in stream if line != ": still here") == "event: fleet"
    assert data(stream)["suspended"]
    submit()
    assert data(stream)["queues"][0]["queued"] == 1


def test_all_who_watch_share_one_look_and_nobody_looks_for_nobody(
    app: OpenAPI, client: FlaskClient, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch: fleet.Watch = app.extensions[WATCH]
    looks: list[float] = []
    read = fleet.Overview.read
    monkeypatch.setattr(fleet.Overview, "read", lambda self: looks.append(time.monotonic()) or read(self))
    streams = [lines(app.test_client()) for _ in range(10)]
    first = [data(stream)["at"] for stream in streams]
    assert len(set(first)) == 1, "the very same look"
    assert watch._thread is not None
    del streams
    eventually(lambda: watch._thread is None)
    seen = len(looks)
    time.sleep(0.1)
    assert len(looks) == seen
    again = lines(client)
    assert data(again)["at"] > first[0], "what was seen before is not shown to who comes later"


def test_the_stream_outlives_redis(
    client: FlaskClient, worker: FakeWorker, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.beat(name="host.gpu0.abc")
    stream = lines(client)
    assert data(stream)["health"]["status"] == "healthy"

    def away(_: object) -> Fleet:
        raise RedisUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(fleet.Overview, "read", away)
        patch.setattr(Broker, "probe", away)
        seen = data(stream)
        assert seen["health"]["status"] == "unhealthy"
        assert [one["name"] for one in seen["workers"]] == ["host.gpu0.abc"]
    assert data(stream)["health"]["status"] == "healthy"


def test_that_redis_is_away_is_waited_for_once(
    client: FlaskClient, worker: FakeWorker, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.beat()
    stream = lines(client)
    assert data(stream)["health"]["status"] == "healthy"
    asked: list[str] = []

    def away(name: str) -> Callable[[object], None]:
        def ask(_: object) -> None:
            asked.append(name)
            raise RedisUnavailable("Redis does not answer")

        return ask

    with monkeypatch.context() as patch:
        for name in ("probe", "workers", "queues", "recent", "runs", "suspended"):
            patch.setattr(Broker, name, away(name))
        seen = data(stream)
        assert seen["health"]["reasons"] == ["Redis does not answer"]
        asked.clear()  # what was asked in a look that had begun before
        eventually(lambda: len(asked) > 1)
        assert set(asked) == {"probe"}, "each question may take as long as that"


def test_time_spent_waiting_for_redis_puts_off_no_look(
    client: FlaskClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(fleet, "MOST_OF_A_CORE", 0.01)
    worker.beat()
    read, lost = fleet.Overview.read, [True]

    def slow(self: fleet.Overview) -> Fleet:
        if lost:
            time.sleep(0.5)
            raise RedisUnavailable("Redis did not answer")
        return read(self)

    monkeypatch.setattr(fleet.Overview, "read", slow)
    stream = lines(client)
    assert data(stream)["workers"] == []
    lost.clear()
    began = time.monotonic()
    assert len(data(stream)["workers"]) == 1
    assert time.monotonic() - began < 5, "not 50 s"


def test_a_server_that_stops_ends_its_streams(app: OpenAPI, client: FlaskClient) -> None:
    stream = lines(client)
    data(stream)
    close(app)
    assert list(stream) == []


def test_only_admins_see_the_fleet_and_only_for_as_long(
    client: FlaskClient, broker: Broker, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme, admin = new_key(broker), new_key(broker, "operators", admin=True)
    orders = ("fleet/pause", "fleet/resume", "workers/x/drain", "workers/x/resume", "workers/x/restart")
    asked = [("GET", "fleet"), ("GET", "fleet/events"), *(("POST", order) for order in orders)]
    for method, path in asked:
        assert client.open(f"/api/{path}", method=method, headers=bearer(acme)).status_code == 403
        assert client.open(f"/api/{path}", method=method).status_code == 401
    assert not broker.suspended()
    monkeypatch.setattr("gateway.admission.KNOWN_S", 0.0)
    stream = lines(client, **bearer(admin))
    data(stream)
    revoke(broker, admin)
    revoked = time.monotonic()
    assert not [line for line in stream if line.startswith("data: ")]
    assert time.monotonic() - revoked < 5, "it ends with what it would have told next"
