"""The whole fleet at a glance, once or as a stream. All who watch share one look a second, and its JSON."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from flask import Response, request
from flask_openapi3.types import ResponseDict

from common import telemetry
from common.broker import Broker
from common.cards import WorkerCard, slot_of
from common.errors import RedisUnavailable
from common.fleet import Fleet, Recent, WorkerView, lines
from gateway import problems
from gateway.admission import Doorkeeper, open_to
from gateway.api import NO_STORE, Api, json_answer
from gateway.described import EVENT
from gateway.health import Checkup

LOOK_EVERY_S = 1.0
LOOK_LATEST_S = 3.0  # however long a look takes
MOST_OF_A_CORE = 0.03  # that looking takes: a fleet of very many queues is looked at less often
SILENCE_S = 15.0  # a viewer hears something at least this often
RETRY_MS = 2000  # after which a viewer should come back

log = telemetry.get_logger()


class Overview:
    """Reads the fleet."""

    def __init__(self, broker: Broker, checkup: Checkup) -> None:
        self._broker = broker
        self._checkup = checkup

    def read(self) -> Fleet:
        """Return the fleet as it is; raises RedisUnavailable."""
        health = self._checkup.look()
        if health.status == "unhealthy":  # what would be asked next would be waited for as long, and as vainly
            raise RedisUnavailable("; ".join(health.reasons))
        cards = self._broker.workers()
        return Fleet(
            at=datetime.now(UTC),
            health=health,
            suspended=self._broker.suspended(),
            queues=lines(self._broker.queues()),
            workers=self.views(cards),
            recent=self._broker.recent(),
            drained_away=sorted(self._broker.drained() - {slot_of(card.name) for card in cards}),
        )

    def views(self, cards: Sequence[WorkerCard]) -> list[WorkerView]:
        """Return the workers with what they are at; raises RedisUnavailable."""
        runs = self._broker.runs()
        return [
            WorkerView(**{name: getattr(card, name) for name in WorkerCard.model_fields}, runs=runs.get(card.name, ()))
            for card in cards
        ]

    def without_redis(self, last: Fleet | None, error: RedisUnavailable) -> Fleet:
        """Return what is left to show while Redis is away: what was seen last, and that it is."""
        now, health = datetime.now(UTC), self._checkup.without_redis(error)
        if last is None:
            return Fleet(at=now, health=health, suspended=False, queues=[], workers=[], recent=Recent())
        return last.model_copy(update={"at": now, "health": health})


class Watch:
    """One look for all who watch. It begins with the first of them and ends with the last."""

    def __init__(self, overview: Overview) -> None:
        self._overview = overview
        self._told = threading.Condition()
        self._nudged = threading.Event()
        self._viewers = 0
        self._thread: threading.Thread | None = None
        self._last: Fleet | None = None
        self._number = 0  # of changes
        self._event = b""
        self.closed = False

    def follow(self) -> Iterator[bytes]:
        """Yield the fleet as a server-sent event, now and at each change, and a comment in times of silence.

        Ends when this process stops.
        """
        told = -1
        with self._viewer():
            while True:
                number, event = self._await_other(told)
                if self.closed:
                    return
                yield event if event and number != told else b": still here\n\n"
                told = number

    def nudge(self) -> None:
        """Look at once: somebody has just changed something."""
        self._nudged.set()

    def close(self) -> None:
        """End all streams. For a process that stops."""
        self.closed = True
        self._nudged.set()
        with self._told:
            self._told.notify_all()

    def _await_other(self, told: int) -> tuple[int, bytes]:
        """Return the last change, by number, once it is another than this, or has been for long."""
        with self._told:
            self._told.wait_for(lambda: self.closed or (self._event and self._number != told), SILENCE_S)
            return self._number, self._event

    @contextmanager
    def _viewer(self) -> Iterator[None]:
        with self._told:
            self._viewers += 1
            if self._thread is None and not self.closed:
                self._event = b""  # what was seen before is old
                self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._told:
                self._viewers -= 1

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            self._nudged.clear()
            seen = False
            try:
                seen = self._look()
            except Exception as error:  # whoever watches would take the silence for calm
                log.error("fleet_not_seen", error=type(error).__name__)
            took_s = time.monotonic() - began
            gap_s = min(took_s / MOST_OF_A_CORE, LOOK_LATEST_S) if seen else 0.0  # waiting for Redis costs no core
            self._nudged.wait(max(LOOK_EVERY_S, gap_s) - took_s)
            with self._told:  # so that a viewer either finds this thread going on, or starts the next
                if self.closed or not self._viewers:
                    self._thread = None
                    return

    def _look(self) -> bool:
        """Look once, and return whether Redis was there to be looked at."""
        try:
            fleet, seen = self._overview.read(), True
        except RedisUnavailable as error:
            fleet, seen = self._overview.without_redis(self._last, error), False
        changed = self._last is None or not self._event or _timeless(fleet) != _timeless(self._last)
        self._last = fleet
        if changed:
            event = f"event: fleet\ndata: {fleet.model_dump_json()}\n\n".encode()
            with self._told:
                self._event, self._number = event, self._number + 1
                self._told.notify_all()
        return seen


def create(overview: Overview, watch: Watch, doorkeeper: Doorkeeper) -> Api:
    """Return the routes that show the whole fleet."""
    api = Api("overview", __name__, about="The whole fleet at a glance.")
    away = problems.documented(RedisUnavailable)
    stream: ResponseDict = {
        "200": {
            "description": "`fleet` (as GET /api/fleet), at once and then at each change, about once a second.",
            "content": {"text/event-stream": {"schema": EVENT}},
        },
        **away,
    }

    @api.get("/api/fleet", responses={"200": Fleet, **away})
    @open_to("admin")
    def fleet() -> Response:
        """Show what waits, who works on what, and how it went in the last minutes."""
        return json_answer(overview.read(), headers=NO_STORE)

    @api.get("/api/fleet/events", responses=stream)
    @open_to("admin")
    def events() -> Response:
        """Watch the fleet as server-sent events, for as long as the key is good."""
        is_good = doorkeeper.witness(request.environ)
        headers = {"X-Accel-Buffering": "no", **NO_STORE}
        return Response(_while_good(watch.follow(), is_good), headers=headers, mimetype="text/event-stream")

    return api


def _while_good(events: Iterator[bytes], is_good: Callable[[], bool]) -> Iterator[bytes]:
    yield f"retry: {RETRY_MS}\n\n".encode()
    for event in events:
        if not is_good():
            return
        yield event


def _timeless(fleet: Fleet) -> Fleet:
    """Return the fleet without what changes though nothing happens."""
    health = fleet.health.model_copy(update={"uptime_seconds": 0.0})
    return fleet.model_copy(update={"at": None, "health": health})
