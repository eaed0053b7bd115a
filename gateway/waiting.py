"""Thousands of requests that wait for their tasks, on one subscription of one background thread.

Whoever waits for a task's end hears only ends: one short message a task. Its steps come by a second subscription, which
is there only while somebody follows a task step by step.

Under gunicorn's gevent worker the threads are greenlets, and the locks and events below let the others run, because
they are looked up in `threading` only once that has been patched.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from common import telemetry
from common.errors import RedisUnavailable
from common.records import Event
from common.schemas import TaskStatus

Signal = Literal["timeout", "look", "progress", "changed", "final"]

SAFETY_NET_S = 10.0  # a waiter reads its task again this often, should an event have been missed …
SAFETY_READS_PER_S = 100  # … but all waiters of a process together no more often than this
LOOKS_PER_S = 512  # of those who have to look at the same moment; a wait's or a stream's end costs a millisecond
CROWD = 50  # so many are spread out over time
STEPS_PER_S = 1000  # that all followers of a process together are told; with many of them, each is told fewer
FRESH_S = 0.1  # a look at a task serves everybody who asks so shortly afterwards
RESTART_S = 1.0

T = TypeVar("T")

FINAL = frozenset(status.value for status in TaskStatus if status.final)

log = telemetry.get_logger()


class Events(Protocol):
    """Broker.events."""

    def __call__(self, stop: Callable[[], bool], *, ends_only: bool = False) -> Iterator[Event | None]: ...


class _Seen(NamedTuple):
    """What a look at a task showed, or why it failed, and how much had been heard of the task before it."""

    heard: int
    at: float
    value: Any = None
    failure: str = ""

    def older_than(self, seconds: float) -> bool:
        return time.monotonic() - self.at > seconds


class Topic:
    """A task that somebody listens to: who does, and what was last seen of it."""

    __slots__ = ("_lock", "_seen", "heard", "listeners")

    def __init__(self) -> None:
        self.listeners: set[Listener] = set()
        self.heard = 0  # events, and doubts whether one was missed
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    def look(self, what: str, read: Callable[[], T], *, fresh_s: float = FRESH_S) -> T:
        """Return what `read` returns: one look serves all who ask at a time, and so does one RedisUnavailable.

        An earlier one will do if nothing was heard since and it is no more than `fresh_s` old.
        """
        with self._lock:
            seen = self._seen.get(what)
            if seen is None or seen.heard != self.heard or seen.older_than(FRESH_S if seen.failure else fresh_s):
                seen = self._seen[what] = self._look(read)
        if seen.failure:
            raise RedisUnavailable(seen.failure)
        value: T = seen.value
        return value

    def _look(self, read: Callable[[], object]) -> _Seen:
        heard = self.heard  # before the look, which may not show what is heard while it lasts
        try:
            value, failure = read(), ""
        except RedisUnavailable as error:
            value, failure = None, error.message
        return _Seen(heard, time.monotonic(), value, failure)


class Listener:
    """One request's ear for one task. Only its request waits on it; only the hub rings it."""

    __slots__ = ("_flag", "_heard", "_resting", "every_step", "step", "steps", "topic")

    def __init__(self, topic: Topic, *, every_step: bool) -> None:
        self.topic = topic
        self.every_step = every_step
        self.step = self.steps = 0  # of the latest progress
        self._heard: Signal = "timeout"
        self._flag = threading.Event()
        self._resting = False

    def ring(self, signal: Signal) -> None:
        """Wake the request. What it has not yet looked at is overwritten by the later and weightier of the two."""
        if self._heard != "final" and not (signal == "progress" and self._heard != "timeout"):
            self._heard = signal
        if not (self._resting and signal == "progress"):
            self._flag.set()

    def wait(self, timeout_s: float) -> Signal:
        """Return what was heard since the last call, after waiting for it for so long at most."""
        if self._heard == "timeout":
            self._flag.wait(timeout_s)
        self._flag.clear()
        heard, self._heard = self._heard, "timeout"
        return heard

    def rest(self, seconds: float) -> None:
        """Let steps go by for so long, unless something weightier is heard. The last of them is there afterwards."""
        self._resting = True
        self._flag.wait(seconds)
        self._resting = False


class Hub:
    """Hands each event to the listeners of its task. A subscription begins with the first who needs it."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._topics: dict[str, Topic] = {}
        self._count = 0
        self._followers = 0
        self._overheard_until = 0.0
        self._overhear: Callable[[str | None], None] = lambda _task_id: None
        self._lock = threading.Lock()
        self._threads: dict[bool, threading.Thread] = {}  # by ends_only
        self.hears_all = False  # whether a subscription to everything stands
        self.closed = False

    @contextmanager
    def listen(self, task_id: str, *, every_step: bool = False) -> Iterator[Listener]:
        """Hear of a task from here on: its end, and with `every_step` also each change and step.

        Read the task after this and not before, or its end may fall in between.
        """
        with self._lock:
            topic = self._topics.setdefault(task_id, Topic())
            listener = Listener(topic, every_step=every_step)
            topic.listeners.add(listener)
            self._count += 1
            self._followers += every_step
            self._start(ends_only=True)
            if every_step:
                self._start(ends_only=False)
        try:
            yield listener
        finally:
            with self._lock:
                self._count -= 1
                self._followers -= every_step
                topic.listeners.discard(listener)
                if not topic.listeners:
                    del self._topics[task_id]

    def overhear(self, heard: Callable[[str | None], None]) -> None:
        """Have `heard` called with every task that anything happens to, and None where something may have been missed.

        Only while `hears_all`, for which somebody must follow, or `stay` be called.
        """
        self._overhear = heard

    def changed(self, task_id: str) -> None:
        """Note that this process itself has just changed a task, which it will hear of a moment later."""
        self._overhear(task_id)

    def stay(self, seconds: float) -> None:
        """Keep the subscription to everything for so much longer, followers or none."""
        self._overheard_until = time.monotonic() + seconds
        if False not in self._threads:
            with self._lock:
                self._start(ends_only=False)

    def safety_net_s(self) -> float:
        """Return for how long a listener should trust silence."""
        return max(SAFETY_NET_S, self._count / SAFETY_READS_PER_S) * random.uniform(0.6, 1.0)

    def turn_s(self, listener: Listener, heard: Signal) -> float:
        """Return how long a listener leaves others the right of way who heard the same and have to look now."""
        many = self._count if heard == "look" else len(listener.topic.listeners) if heard in ("changed", "final") else 0
        return 0.0 if many < CROWD or self.closed else random.uniform(0.0, many / LOOKS_PER_S)

    def step_gap_s(self) -> float:
        """Return how long a follower who was told a step leaves others the right of way."""
        return random.uniform(0.5, 1.5) * self._followers / STEPS_PER_S

    def close(self) -> None:
        """Let everybody answer now with what they know, and end the subscriptions. For a process that stops."""
        self.closed = True
        self._ring_all("look", followers_only=False)

    def _start(self, *, ends_only: bool) -> None:
        if ends_only not in self._threads and not self.closed:
            thread = threading.Thread(target=self._run, args=(ends_only,), name="events", daemon=True)
            self._threads[ends_only] = thread
            thread.start()

    def _run(self, ends_only: bool) -> None:
        def over() -> bool:
            wanted = ends_only or self._followers or time.monotonic() < self._overheard_until
            return self.closed or not wanted

        pause = threading.Event()
        while True:
            try:
                for event in self._events(over, ends_only=ends_only):
                    self._hand_out(event, ends_only)
            except Exception as error:
                log.error("events_failed", error=type(error).__name__)
                self._doubt(ends_only)
                pause.wait(RESTART_S)
            with self._lock:  # so that a follower either finds this thread going on, or starts the next
                if over():
                    del self._threads[ends_only]
                    self._doubt(ends_only)
                    return

    def _doubt(self, ends_only: bool, *, stands: bool = False) -> None:
        if not ends_only:
            self.hears_all = stands
            self._overhear(None)

    def _hand_out(self, event: Event | None, ends_only: bool) -> None:
        if event is None:
            self._doubt(ends_only, stands=True)
            self._ring_all("look", followers_only=not ends_only)
            return
        if not ends_only:
            self._overhear(event.task_id)
        topic = self._topics.get(event.task_id)
        if topic is None:
            return
        final = event.name in FINAL
        signal: Signal = "final" if final else "progress" if event.name == "progress" else "changed"
        with self._lock:
            topic.heard += 1
            for listener in topic.listeners:
                if signal == "progress":
                    listener.step, listener.steps = event.step, event.steps
                if final or listener.every_step:
                    listener.ring(signal)

    def _ring_all(self, signal: Signal, *, followers_only: bool) -> None:
        with self._lock:
            for topic in self._topics.values():
                topic.heard += 1
                for listener in topic.listeners:
                    if listener.every_step or not followers_only:
                        listener.ring(signal)
