"""Clients that submit over HTTP at a bounded rate, insist until they are acknowledged, and note what they are told."""

from __future__ import annotations

import hashlib
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import requests

from tests.faults.ledger import Ledger

TIMEOUT_S = 5.0  # of one HTTP request
LOOK_S = 0.25  # the longest that a client waits at one task before it looks at the next
RETRY_S = 0.1  # between two tries; shorter than what Retry-After asks, so that tries meet faults
OVERLOADED = (429, 502, 503, 504)  # answers that promise nothing: the same request may be sent again
FORGETS = (404, 410)  # a status nobody who got a 202 should see; the audit decides, after the drain


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What the clients ask for, each value drawn evenly; shares are between 0 and 1."""

    model: str = "simulated"
    sides: Sequence[int] = (64, 96, 128)  # pixels
    steps: Sequence[int] = (2, 4, 8)
    pictures: Sequence[int] = (1, 1, 1, 2)
    priorities: Sequence[str] = ("high", "normal", "normal", "low")
    cancel_share: float = 0.0
    deadline_share: float = 0.0
    deadline_s: float = 0.5

    def draw(self, chance: random.Random, key: str) -> dict[str, Any]:
        """Return a body for /api/submit. PNG, so that pixels come back as they were drawn."""
        body: dict[str, Any] = {
            "prompt": f"picture {key}",
            "model": self.model,
            "seed": chance.randrange(2**40),
            "width": chance.choice(self.sides),
            "height": chance.choice(self.sides),
            "steps": chance.choice(self.steps),
            "n": chance.choice(self.pictures),
            "priority": chance.choice(self.priorities),
            "format": "png",
            "metadata": {"key": key},
        }
        if chance.random() < self.deadline_share:
            body["deadline_s"] = self.deadline_s
        return body


class Load:
    """Client threads between start and stop. Each follows its own tasks until it has seen them end.

    `with Load(…)` sends for as long as the block lasts; then `drain` waits for the tasks' ends. At most `backlog` tasks
    are on their way at once, so that an outage cannot pile up work without bound.
    """

    def __init__(
        self,
        url: str,
        ledger: Ledger,
        *,
        rate_s: float = 10.0,
        clients: int = 4,
        backlog: int = 40,
        mix: Mix | None = None,
    ) -> None:
        self._url = url
        self._ledger = ledger
        self._interval_s = clients / rate_s
        self._backlog = max(1, backlog // clients)
        self._mix = mix or Mix()
        self._stopping = threading.Event()
        self._abandoned = threading.Event()
        self._threads = [threading.Thread(target=self._run, name=f"client {n}", daemon=True) for n in range(clients)]

    def start(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Send nothing new; what was sent is still followed to its end."""
        self._stopping.set()

    def drain(self, within_s: float = 60.0) -> bool:
        """Stop, and wait until every client has seen all its tasks end; returns whether they all did."""
        self.stop()
        until = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        alive = any(thread.is_alive() for thread in self._threads)
        self._abandoned.set()
        for thread in self._threads:
            thread.join()
        return not alive

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is not None:
            self.drain(within_s=0.0)

    def _run(self) -> None:
        chance = random.Random()
        following: deque[str] = deque()  # acknowledged, and not yet seen to end
        due = time.monotonic() + chance.random() * self._interval_s
        with requests.Session() as session:
            while not self._abandoned.is_set() and (following or not self._stopping.is_set()):
                now = time.monotonic()
                if now >= due and len(following) < self._backlog and not self._stopping.is_set():
                    due = max(due + self._interval_s, now)  # what an outage held up is not sent in a burst
                    task_id = self._submit(session, self._mix.draw(chance, secrets.token_hex(8)))
                    if task_id:
                        following.append(task_id)
                        if chance.random() < self._mix.cancel_share:
                            self._cancel(session, task_id)
                elif following:
                    sends = len(following) < self._backlog and not self._stopping.is_set()
                    wait_s = min(LOOK_S, max(0.0, due - now)) if sends else LOOK_S
                    task_id = following.popleft()
                    if not self._look(session, task_id, wait_s):
                        following.append(task_id)
                else:
                    self._stopping.wait(max(0.0, due - now))

    def _submit(self, session: requests.Session, body: Mapping[str, Any]) -> str | None:
        """Send until acknowledged, always under the same key; returns the task's id, or None for a refusal."""
        key = body["metadata"]["key"]
        self._ledger.write("sent", key=key, body=body)
        while not self._abandoned.is_set():
            answer = self._ask(session, "POST", "/api/submit", json=body, headers={"Idempotency-Key": key})
            if answer is not None and answer.status_code == 202 and (task := _json(answer).get("task_id")):
                self._ledger.write("accepted", key=key, task=task)
                return str(task)
            if answer is not None and answer.status_code not in OVERLOADED:
                self._ledger.write("refused", key=key, why=f"submit: {answer.status_code} {answer.text[:200]}")
                return None
            self._ledger.write("unanswered", key=key, why="no answer" if answer is None else str(answer.status_code))
            self._abandoned.wait(RETRY_S)
        return None

    def _cancel(self, session: requests.Session, task_id: str) -> None:
        self._ledger.write("cancel", task=task_id)
        self._ask(session, "POST", f"/api/cancel/{task_id}")

    def _look(self, session: requests.Session, task_id: str, wait_s: float) -> bool:
        """Ask for a task's status; returns whether it is done with: final, and its pictures fetched."""
        answer = self._ask(session, "GET", f"/api/status/{task_id}", params={"wait": f"{wait_s:.3f}"})
        if answer is None or answer.status_code != 200:
            if answer is not None and answer.status_code not in (*OVERLOADED, *FORGETS):
                self._ledger.write("refused", key=task_id, why=f"status: {answer.status_code} {answer.text[:200]}")
            self._abandoned.wait(RETRY_S)
            return False
        view = _json(answer)
        if view.get("status", "queued") in ("queued", "running"):
            return False
        shas = []
        for image in view["images"]:
            picture = self._ask(session, "GET", image["url"])
            if picture is None or picture.status_code in OVERLOADED:
                return False  # its end is noted once the pictures are there
            sha = hashlib.sha256(picture.content).hexdigest()
            shas.append(sha if picture.status_code == 200 else f"HTTP {picture.status_code}")
        error, total_ms = view["error"] or {}, view["timings"]["total_ms"]
        self._ledger.write(
            "final", task=task_id, status=view["status"], error_code=error.get("code"), shas=shas, total_ms=total_ms
        )
        return True

    def _ask(self, session: requests.Session, method: str, path: str, **options: Any) -> requests.Response | None:
        """Send one request; None when no whole answer came."""
        try:
            return session.request(method, self._url + path, timeout=TIMEOUT_S, **options)
        except requests.RequestException:
            return None


def _json(answer: requests.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
