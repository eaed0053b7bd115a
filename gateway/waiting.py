"""Thousands of requests that wait for their tasks, on one subscription of one background thread.

Whoever waits for a task's end hears only ends: one short message a task. Its steps come by a second subscription, which
is there only while somebody follows a task step by step.

Under gunicorn's gevent worker the threads are greenlets, and the locks and events below let the others run, because
they are looked up in `threading` only once that has been patched.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from common import telemetry
from common.records import Event
from common.schemas import TaskStatus

Signal = Literal["timeout", "look", "progress", "changed", "final"]

SAFETY_NET_S = 10.0  # a waiter reads its task again this often, should an event have been missed …
SAFETY_READS_PER_S = 200  # … but all waiters of a process together no more often than this
CATCH_UP_READS_PER_S = 1000  # after a re-subscription everybody looks again, spread out at this rate
RESTART_S = 1.0

FINAL = frozenset(status.value for status in TaskStatus if status.final)

log = telemetry.get_logger()


class Events(Protocol):
    """Broker.events."""

    def __call__(self, stop: Callable[[], bool], *, ends_only: bool = False) -> Iterator[Event | None]: ...


class Listener:
    """One request's ear for one task. Only its request waits on it; only the hub rings it."""

    __slots__ = ("_flag", "_heard", "every_step", "step", "steps")

    def __init__(self, *, every_step: bool) -> None:
        self.every_step = every_step
        self.step = self.steps = 0  # of the latest progress
        self._heard: Signal = "timeout"
        self._flag = threading.Event()

    def ring(self, signal: Signal) -> None:
        """Wake the request. What it has not yet looked at is overwritten by the later and weightier of the two."""
        if self._heard != "final" and not (signal == "progress" and self._heard != "timeout"):
            self._heard = signal
        self._flag.set()

    def wait(self, timeout_s: float) -> Signal:
        """Return what was heard since the last call, after waiting for it for so long at most."""
        self._flag.wait(timeout_s)
        self._flag.clear()
        heard, self._heard = self._heard, "timeout"
        return heard


class Hub:
    """Hands each event to the listeners of its task. A subscription begins with the first listener that needs it."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._listeners: dict[str, set[Listener]] = {}
        self._count = 0
        self._followers = 0
        self._lock = threading.Lock()
        self._threads: dict[bool, threading.Thread] = {}  # by ends_only
        self.closed = False

    @contextmanager
    def listen(self, task_id: str, *, every_step: bool = False) -> Iterator[Listener]:
        """Hear of a task from here on: its end, and with `every_step` also each change and step.

        Read the task after this and not before, or its end may fall in between.
        """
        listener = Listener(every_step=every_step)
        with self._lock:
            self._listeners.setdefault(task_id, set()).add(listener)
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
                mine = self._listeners[task_id]
                mine.discard(listener)
                if not mine:
                    del self._listeners[task_id]

    def safety_net_s(self) -> float:
        """Return for how long a listener should trust silence."""
        return max(SAFETY_NET_S, self._count / SAFETY_READS_PER_S) * random.uniform(0.9, 1.1)

    def catch_up_s(self) -> float:
        """Return how long this listener leaves others the right of way when everybody has to look again."""
        return random.uniform(0.0, self._count / CATCH_UP_READS_PER_S)

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
            return self.closed or not (ends_only or self._followers)

        pause = threading.Event()
        while True:
            try:
                for event in self._events(over, ends_only=ends_only):
                    self._hand_out(event, ends_only)
            except Exception as error:
                log.error("events_failed", error=type(error).__name__)
                pause.wait(RESTART_S)
            with self._lock:  # so that a follower either finds this thread going on, or starts the next
                if over():
                    del self._threads[ends_only]
                    return

    def _hand_out(self, event: Event | None, ends_only: bool) -> None:
        if event is None:
            self._ring_all("look", followers_only=not ends_only)
            return
        listeners = self._listeners.get(event.task_id)
        if not listeners:
            return
        final = event.name in FINAL
        signal: Signal = "final" if final else "progress" if event.name == "progress" else "changed"
        with self._lock:
            for listener in listeners:
                if signal == "progress":
                    listener.step, listener.steps = event.step, event.steps
                if final or listener.every_step:
                    listener.ring(signal)

    def _ring_all(self, signal: Signal, *, followers_only: bool) -> None:
        with self._lock:
            for listeners in self._listeners.values():
                for listener in listeners:
                    if listener.every_step or not followers_only:
                        listener.ring(signal)
