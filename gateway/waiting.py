"""Thousands of requests that wait for their tasks, on one subscription of one background thread.

Under gunicorn's gevent worker the thread is a greenlet and the locks and events below yield to the others, because they
are looked up in `threading` only once that has been patched.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from common import telemetry
from common.broker import Event
from common.schemas import TaskStatus

Events = Callable[[Callable[[], bool]], Iterator[Event | None]]  # Broker.events
Signal = Literal["timeout", "look", "progress", "changed", "final"]

SAFETY_NET_S = 10.0  # a waiter reads its task again this often, should an event have been missed …
SAFETY_READS_PER_S = 200  # … but all waiters of a process together no more often than this
CATCH_UP_READS_PER_S = 1000  # after a re-subscription everybody looks again, spread out at this rate
RESTART_S = 1.0

FINAL = frozenset(status.value for status in TaskStatus if status.final)

log = telemetry.get_logger()


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
    """Hands each event to the listeners of its task. The subscription begins with the first listener."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._listeners: dict[str, set[Listener]] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
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
            self._start()
        try:
            yield listener
        finally:
            with self._lock:
                self._count -= 1
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
        """Let everybody answer now with what they know, and end the subscription. For a process that stops."""
        self.closed = True
        self._ring_all("look")

    def _start(self) -> None:
        if self._thread is None and not self.closed:
            self._thread = threading.Thread(target=self._run, name="events", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        pause = threading.Event()
        while not self.closed:
            try:
                for event in self._events(lambda: self.closed):
                    self._hand_out(event)
            except Exception as error:
                log.error("events_failed", error=type(error).__name__)
                pause.wait(RESTART_S)

    def _hand_out(self, event: Event | None) -> None:
        if event is None:
            self._ring_all("look")
            return
        listeners = self._listeners.get(event.task_id)
        if not listeners:
            return
        final = event.name in FINAL
        signal: Signal = "final" if final else "progress" if event.name == "progress" else "changed"
        with self._lock:
            for listener in listeners:
                if final or listener.every_step:
                    listener.step, listener.steps = event.step, event.steps
                    listener.ring(signal)

    def _ring_all(self, signal: Signal) -> None:
        with self._lock:
            for listeners in self._listeners.values():
                for listener in listeners:
                    listener.ring(signal)
