"""What this process has promised of late, told again to a Redis that came back without its last moments.

Redis may forget a second or so: the tail of its file in a power cut, or what a replica had not yet heard when it took
over. Every transition is safe to send twice. So the calls that promised something are kept for some seconds, and told
again, in their order, before anything else is asked of a Redis whose data has another history than they were made in.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from common.connection import NotYet, Script, Send, run_scripts
from common.telemetry import get_logger

HORIZON_S = 5.0  # before the last good answer; Redis writes to disk every second, and replicas lag less
MOST_KEPT = 5_000
TOLD_AT_ONCE = 250  # far less than a time-out's worth

MADE_BY = {"cancel": ("canceled", "flagged"), "finish": ("ok", "already")}  # answers that are a promise
HEALED_BY = {"submit": "created", "finish": "ok"}  # answers that show it had been forgotten; a cancel's never does

AGAIN = {"submit": ("again",), "finish": ("again",)}  # what marks a call as one that was agreed to before

log = get_logger()


class Promise(NamedTuple):
    """A transition that Redis had agreed to: when, on time.monotonic's clock, and in which history of its data."""

    at: float
    script: str
    args: tuple[str | float, ...]
    history: str


class Promises:
    """One broker's promises. Safe to share between threads and greenlets."""

    def __init__(self, scripts: Mapping[str, Script], void: Callable[[str, int], None] | None = None) -> None:
        """`void` is called with the id and fence of a finish that was agreed to, forgotten, and came too late again."""
        self._scripts = scripts
        self._void = void or (lambda _task_id, _fence: None)
        self._kept: deque[Promise] = deque(maxlen=MOST_KEPT)
        self._lock = threading.Lock()  # of what is kept
        self._telling = threading.RLock()  # held by the one thread that tells, which may have to connect for it
        self._history = ""  # of the Redis that was connected to last
        self._doubts = self._settled = 0  # one goes up when some promises may be of another history; the other follows

    def connected(self, history: str, send: Send) -> None:
        """Tell a Redis that has just been connected to what it may have forgotten, if its data has another history."""
        with self._lock:
            # any: while a failover goes on, another connection may still have been taken by the old primary
            if history != self._history or any(promise.history != history for promise in self._kept):
                self._history = history
                self._doubts += 1
        self.renew(send)

    def heed(self, script: str, args: tuple[str | float, ...], reply: Any, history: str) -> None:
        """Keep a call if its reply is a promise."""
        if script == "submit":
            made = reply[0] in ("created", "exists") and reply[1] == args[0]  # under another id it is another's
        else:
            made = reply in MADE_BY.get(script, ())
        if made:
            with self._lock:
                self._kept.append(Promise(time.monotonic(), script, args, history))
            if history != self._history:  # by a primary that was on its way out
                self._doubts += 1

    def renew(self, send: Send) -> None:
        """Tell Redis again what it may have forgotten; raises NotYet while another thread is at it."""
        doubts = self._doubts
        if doubts == self._settled:
            return
        if not self._telling.acquire(blocking=False):
            raise NotYet("Redis is back, and still being told what it may have forgotten")
        try:
            self._tell(send)
            self._settled = doubts
        finally:
            self._telling.release()

    def answered(self) -> None:
        """Note a good answer, by which promises are let go that are older than the horizon before it."""
        if self._doubts != self._settled:
            return  # it was from before
        horizon = time.monotonic() - HORIZON_S
        with self._lock:
            while self._kept and self._kept[0].at < horizon:
                self._kept.popleft()

    def _tell(self, send: Send) -> None:
        with self._lock:
            astray = [promise for promise in self._kept if promise.history != self._history]
        healed = 0
        for i in range(0, len(astray), TOLD_AT_ONCE):
            healed += self._tell_some(send, astray[i : i + TOLD_AT_ONCE])
        if healed:
            log.warning("promises_replayed", count=healed, told=len(astray))

    def _tell_some(self, send: Send, promises: Sequence[Promise]) -> int:
        calls = [(self._scripts[p.script], (*p.args, *AGAIN.get(p.script, ()))) for p in promises]
        replies, history = run_scripts(send, calls)
        told, now = {id(promise) for promise in promises}, time.monotonic()
        with self._lock:  # what is new to it can be forgotten once more
            renewed = (p._replace(at=now, history=history) if id(p) in told else p for p in self._kept)
            self._kept = deque(renewed, MOST_KEPT)
        answers = [reply[0] if isinstance(reply, list) else reply for reply in replies]
        for promise, answer in zip(promises, answers, strict=True):
            if promise.script == "finish" and answer == "lost":
                self._void(str(promise.args[0]), int(promise.args[1]))
        return sum(answer == HEALED_BY.get(p.script, "") for p, answer in zip(promises, answers, strict=True))
