"""What this process has promised of late, told again to a Redis that came back without its last moments.

Redis may forget a second or so: the tail of its file in a power cut, or what a replica had not yet heard when it took
over. Every transition is safe to send twice. So the calls that promised something are kept for some seconds, and told
again, in their order, before anything else is asked of a Redis that had been away.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from common.connection import Client, NotYet, Script, history, run_scripts, transient
from common.telemetry import get_logger

T = TypeVar("T")

HORIZON_S = 5.0  # before the last good answer; Redis writes to disk every second, and replicas lag less
MOST_KEPT = 5_000
TOLD_AT_ONCE = 250  # far less than a time-out's worth

MADE_BY = {"cancel": ("canceled", "flagged"), "finish": ("ok", "already")}  # answers that are a promise
HEALED_BY = {"submit": "created", "finish": "ok"}  # answers that show it had been forgotten; a cancel's never does

log = get_logger()


class Promise(NamedTuple):
    """A transition that Redis had agreed to, and when it did on time.monotonic's clock."""

    at: float
    script: str
    args: tuple[str | float, ...]


class Promises:
    """One broker's promises. Safe to share between threads and greenlets."""

    def __init__(self, client: Client, scripts: Mapping[str, Script]) -> None:
        self._client = client
        self._scripts = scripts
        self._kept: deque[Promise] = deque(maxlen=MOST_KEPT)
        self._lock = threading.Lock()  # of what is kept
        self._telling = threading.Lock()  # held by the one thread that tells
        self._history: str | None = None  # of Redis' data, as of the last telling
        self._doubts = self._settled = 0  # one goes up with each sign that Redis was away, the other catches up

    def heed(self, script: str, args: tuple[str | float, ...], reply: Any) -> None:
        """Keep a call if its reply is a promise."""
        if script == "submit":
            made = reply[0] in ("created", "exists") and reply[1] == args[0]  # under another id it is another's
        else:
            made = reply in MADE_BY.get(script, ())
        if made:
            with self._lock:
                self._kept.append(Promise(time.monotonic(), script, args))

    def doubt(self) -> None:
        """Note that Redis was away, so that it may have forgotten something."""
        self._doubts += 1

    def through(self, call: Callable[[], T]) -> T:
        """Return what a call to Redis returns; before it, tell Redis again what it may have forgotten."""
        self.renew()
        try:
            answer = call()
        except Exception as error:
            if transient(error):
                self.doubt()
            raise
        self._drop_old()
        return answer

    def renew(self) -> None:
        """Tell Redis again what it may have forgotten; raises NotYet while another thread is at it."""
        doubts = self._doubts
        if doubts == self._settled:
            return
        if not self._telling.acquire(blocking=False):
            raise NotYet("Redis is back, and still being told what it may have forgotten")
        try:
            self._tell()
            self._settled = doubts
        except Exception as error:
            if transient(error):
                self.doubt()
            raise
        finally:
            self._telling.release()

    def _tell(self) -> None:
        with self._lock:
            promises = list(self._kept)
        if not promises:
            return
        current = history(self._client)
        if current and current == self._history:
            return  # it was slow or out of reach, and has forgotten nothing
        healed = sum(self._tell_some(promises[i : i + TOLD_AT_ONCE]) for i in range(0, len(promises), TOLD_AT_ONCE))
        self._history = current
        with self._lock:  # what is new to it can be forgotten once more
            now = time.monotonic()
            self._kept = deque((promise._replace(at=now) for promise in self._kept), MOST_KEPT)
        if healed:
            log.warning("promises_replayed", count=healed, told=len(promises))

    def _tell_some(self, promises: Sequence[Promise]) -> int:
        again = {"submit": ("again",)}
        calls = [(self._scripts[p.script], (*p.args, *again.get(p.script, ()))) for p in promises]
        replies = run_scripts(self._client, calls)
        answers = [reply[0] if isinstance(reply, list) else reply for reply in replies]
        return sum(answer == HEALED_BY.get(p.script) for p, answer in zip(promises, answers, strict=True))

    def _drop_old(self) -> None:
        if self._doubts != self._settled:
            return  # that answer was from before
        horizon = time.monotonic() - HORIZON_S
        with self._lock:
            while self._kept and self._kept[0].at < horizon:
                self._kept.popleft()
