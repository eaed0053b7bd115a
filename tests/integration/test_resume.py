"""Streams of events that are cut and taken up again: from a real gateway, and through Nginx."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common.broker import Broker
from common.records import Hold
from common.settings import Settings
from common.storage import open_storage
from tests.integration.nginx_edge import nginx
from tests.integration.test_gateway import Gateway
from tests.servers import eventually
from tests.unit.gateway.fake_worker import FakeWorker


class Event(NamedTuple):
    """One event as it came."""

    name: str
    id: str
    data: dict[str, Any]

    @property
    def told(self) -> tuple[object, ...]:
        """All that is not different from one task to another."""
        if self.name == "progress":
            return self.name, self.id, self.data["step"], self.data["steps"]
        outcomes = [attempt["outcome"] for attempt in self.data["attempts"]]
        return (
            self.name,
            self.id,
            self.data["status"],
            self.data["progress"]["step"],
            *outcomes,
            len(self.data["images"]),
        )

    @property
    def change(self) -> tuple[str, str]:
        """What must never be missed: which attempt, which state."""
        attempt, state, _ = self.id.split(".", 2)
        return attempt, state


class Stream:
    """One connection that follows a task."""

    def __init__(self, port: int, task_id: str, last_id: str = "") -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        headers = {"Last-Event-ID": last_id} if last_id else {}
        self._connection.request("GET", f"/api/tasks/{task_id}/events", headers=headers)
        self.answer = self._connection.getresponse()

    def next(self) -> Event | None:
        """Return the next event, or None at the end."""
        fields: dict[str, str] = {}
        while line := self.answer.readline().decode():
            name, _, value = line.rstrip("\n").partition(": ")
            if name:
                fields[name] = value
            elif "event" in fields:
                return Event(fields["event"], fields["id"], json.loads(fields["data"]))
            else:
                fields.clear()
        return None

    def rest(self) -> list[Event]:
        """Return all events up to the end."""
        return list(iter(self.next, None))

    def close(self) -> None:
        self.answer.close()
        self._connection.close()


class Life:
    """A task whose life goes on one event at a time: two attempts, the first of which is given back."""

    def __init__(self, gateway: Gateway, broker: Broker, settings: Settings) -> None:
        self._worker = FakeWorker(broker, open_storage(settings))
        self._broker = broker
        self.task_id = gateway.submit(steps=4)
        self._hold = Hold(self.task_id, 1)
        self._acts: list[Callable[[], object]] = [
            self._take, lambda: self._step(1), lambda: self._step(3), self._release,
            self._take, lambda: self._step(1), lambda: self._step(2), self._end,
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self._acts)

    def go_on(self) -> None:
        self._acts.pop(0)()

    def _take(self) -> None:
        (task,) = self._worker.take()
        assert task.task_id == self.task_id
        self._task, self._hold = task, Hold(task.task_id, task.fence)

    def _step(self, step: int) -> None:
        assert self._broker.progress("w1", {self._hold: (step, 4)}) == ["ok"]

    def _release(self) -> None:
        assert self._broker.release("w1", self._hold) == "ok"

    def _end(self) -> None:
        self._worker.succeed(self._task)


IDS = (
    "0.queued.0", "1.running.0", "1.running.1", "1.running.3", "1.queued.0",
    "2.running.0", "2.running.1", "2.running.2", "2.succeeded.4",
)  # fmt: skip


@pytest.fixture
def gateway(settings: Settings, tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(settings, tmp_path / "gateway.log") as gateway:
        yield gateway


def uninterrupted(port: int, life: Life) -> list[Event]:
    """Follow a whole life on one connection."""
    stream = Stream(port, life.task_id)
    seen = [stream.next()]
    while len(life):
        life.go_on()
        seen.append(stream.next())
    assert stream.next() is None
    return [event for event in seen if event]


def cut_at(port: int, life: Life, cut: int, *, away: int) -> tuple[list[Event], list[Event]]:
    """Cut the connection at an event, come back after as many acts, and return what was told before and after."""
    stream = Stream(port, life.task_id)
    before = [stream.next()]
    while len(before) <= cut:
        life.go_on()
        before.append(stream.next())
    stream.close()
    for _ in range(min(away, len(life))):
        life.go_on()
    last = before[-1]
    assert last is not None
    stream = Stream(port, life.task_id, last.id)
    after = []
    if away and stream.answer.status == 200:
        after.append(stream.next())
    while len(life):
        life.go_on()
        after.append(stream.next())
    after += stream.rest()
    stream.close()
    return [event for event in before if event], [event for event in after if event]


def test_a_cut_at_any_event_changes_nothing(gateway: Gateway, broker: Broker, settings: Settings) -> None:
    def life() -> Life:
        return Life(gateway, broker, settings)

    whole = uninterrupted(gateway.port, life())
    assert tuple(event.id for event in whole) == IDS
    for away in (0, 1):  # nothing happens meanwhile, or the next thing does
        for cut in range(len(IDS) - 1):
            before, after = cut_at(gateway.port, life(), cut, away=away)
            assert [event.told for event in before + after] == [event.told for event in whole], (away, cut)


def test_however_much_is_missed_every_change_is_told_once_and_in_order(
    gateway: Gateway, broker: Broker, settings: Settings
) -> None:
    for cut in range(len(IDS) - 1):
        before, after = cut_at(gateway.port, Life(gateway, broker, settings), cut, away=99)
        ids = [event.id for event in before + after]
        assert len(set(ids)) == len(ids)
        changes = list(dict.fromkeys(event.change for event in before + after))
        assert changes == list(dict.fromkeys(tuple(each.split(".")[:2]) for each in IDS)), cut


def test_whoever_has_seen_the_end_is_told_not_to_come_back(
    gateway: Gateway, broker: Broker, settings: Settings
) -> None:
    life = Life(gateway, broker, settings)
    last = uninterrupted(gateway.port, life)[-1]
    assert Stream(gateway.port, life.task_id, last.id).answer.status == 204
    for unknown in ("", "ended", "9.running.1", "1.succeeded.4", "\u00e4", "x" * 5000):
        again = Stream(gateway.port, life.task_id, unknown).rest()
        assert [event.name for event in again] == ["status", "succeeded"], unknown
    assert Stream(gateway.port, "0" * 32, last.id).answer.status == 404


def test_through_nginx_too(gateway: Gateway, broker: Broker, settings: Settings, tmp_path: Path) -> None:
    with nginx(tmp_path / "edge", gateway.port) as edge:
        whole = uninterrupted(edge.port, Life(gateway, broker, settings))
        for cut in range(0, len(IDS) - 1, 2):
            before, after = cut_at(edge.port, Life(gateway, broker, settings), cut, away=1)
            assert [event.told for event in before + after] == [event.told for event in whole], cut
        task_id = gateway.submit()
        stream = Stream(edge.port, task_id, "0.queued.0")  # there is nothing new, and yet the answer begins at once
        assert stream.answer.status == 200
        stream.close()
        known = poll(edge.port, task_id).headers["ETag"]
        assert known.startswith('W/"')
        unchanged = poll(edge.port, task_id, known)
        assert (unchanged.status, unchanged.read(), unchanged.headers["ETag"]) == (304, b"", known)
        assert unchanged.headers["Cache-Control"] == "no-store" and unchanged.headers["X-Request-ID"]


def poll(port: int, task_id: str, known: str = "") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"If-None-Match": known, "Accept-Encoding": "gzip"} if known else {}
    connection.request("GET", f"/api/status/{task_id}", headers=headers)
    return connection.getresponse()


def test_hundreds_on_one_task_share_one_look_and_all_hear_each_change(
    gateway: Gateway, broker: Broker, settings: Settings
) -> None:
    life = Life(gateway, broker, settings)
    streams = [Stream(gateway.port, life.task_id) for _ in range(300)]
    for stream in streams:
        assert stream.next()
    looks = reads(broker)
    while len(life):
        life.go_on()
    told: Sequence[list[Event]] = [stream.rest() for stream in streams]
    for events in told:
        changes = list(dict.fromkeys(event.change for event in events))
        assert changes == [("1", "running"), ("1", "queued"), ("2", "running"), ("2", "succeeded")]
        steps = [event.data["step"] for event in events if event.name == "progress"]
        assert len(steps) <= 4
    eventually(lambda: reads(broker) - looks < 100)


def reads(broker: Broker) -> int:
    """How many scripts Redis has run."""
    found = broker._redis.info("commandstats")["cmdstat_evalsha"]["calls"]
    return int(found)
