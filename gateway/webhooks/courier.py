"""The courier: takes deliveries from Redis and tells them, several at once, until it is stopped.

Each try has a thread and ten seconds. No tenant has more than a few under way here, so that one whose receiver hangs
holds up itself. Any number of couriers may run side by side; what one that dies had under way is told again by others.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple

from common.broker import Broker
from common.errors import RedisUnavailable
from common.records import Errand
from common.schemas import TaskView, Wire
from common.servicemanager import ServiceManager
from common.telemetry import get_logger
from gateway.dialects.native import render
from gateway.webhooks import signing
from gateway.webhooks.post import Answer, Cutoff, Poster, Unreachable
from gateway.webhooks.targets import Refused, Targets

PAUSES_S = (10, 30, 60, 150, 300, 600, 1200, 1800, 3000)  # between ten tries: 1 h 59 min
JITTER = 0.1  # of a pause, either way, so that what failed together does not come back together
LONGEST_RETRY_AFTER_S = 3600.0
TRY_S = 10.0
LEASE_S = 30.0  # of a try
AT_ONCE = 32
MOST_OF_TENANT = 8
STOP_S = 3.0  # what is under way may end within this, when the courier is stopped
LOOK_AGAIN_S = 0.2  # for tenants that are not at their most, while others are
IDLE_S = 1.0  # between looks for what is due, at the longest
MEND_S = 30.0
SAMPLE_S = 1.0  # how often the fleet's history is looked after, which must go on without a worker as well
AWAY_S = 1.0  # between looks while Redis is away

log = get_logger()


class Message(Wire):
    """The body of a delivery. `timestamp` is when it happened, `data` the task as it is now."""

    type: str
    timestamp: datetime
    data: TaskView


class Verdict(NamedTuple):
    """What a try came to."""

    outcome: Literal["delivered", "failed", "again", "back"]
    status: int | None = None
    error: str = ""
    pause_s: float = 0.0


class Courier:
    """One process's deliveries."""

    def __init__(
        self,
        broker: Broker,
        targets: Targets,
        *,
        pauses_s: Sequence[float] = PAUSES_S,
        try_s: float = TRY_S,
        lease_s: float = LEASE_S,
        most_of_tenant: int = MOST_OF_TENANT,
        manager: ServiceManager | None = None,
    ) -> None:
        """`pauses_s` are those between tries: there is one try more. `manager` is told how it goes."""
        self.name = f"{socket.gethostname()}.webhooks.{os.getpid()}.{secrets.token_hex(3)}"
        self._broker = broker
        self._targets = targets
        self._poster = Poster()
        self._pauses_s = pauses_s
        self._try_s = try_s
        self._lease_s = lease_s
        self._most = most_of_tenant
        self._under_way: dict[Errand, Cutoff] = {}
        self._lock = threading.Lock()  # of what is under way
        self._manager = manager or ServiceManager()
        self._ended = threading.Event()  # a try has
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let `run` end soon. May be called by a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Deliver until stopped; then let end what is under way, or give it back."""
        log.info("courier_started", courier=self.name)
        mend_at = sample_at = 0.0
        while not self._stopping.is_set():
            self._manager.alive()
            try:
                if time.monotonic() >= sample_at:
                    sample_at = time.monotonic() + SAMPLE_S
                    self._broker.sample()
                if time.monotonic() >= mend_at:
                    mend_at = time.monotonic() + MEND_S
                    for stray in self._broker.mend_deliveries(MEND_S / 2):
                        log.warning("webhook_put_back", **stray._asdict())
                self._feed()
                self._manager.ready()
            except RedisUnavailable as error:
                log.warning("redis_away", error=error.message)
                self._stopping.wait(AWAY_S)
        self._manager.stopping()
        self._drain()
        log.info("courier_stopped", courier=self.name)

    def _feed(self) -> None:
        """Begin as many tries as there is room for, and wait until there may be reason to begin others."""
        self._ended.clear()
        with self._lock:
            of_tenants = Counter(errand.tenant for errand in self._under_way)
        room = AT_ONCE - of_tenants.total()
        if room <= 0:
            self._ended.wait(LOOK_AGAIN_S)
            return
        errands = self._broker.take_deliveries(self.name, room, of_tenants, most=self._most, lease_s=self._lease_s)
        for errand in errands.taken:
            cutoff = Cutoff(self._try_s)
            with self._lock:
                self._under_way[errand] = cutoff
            threading.Thread(target=self._run_errand, args=(errand, cutoff), daemon=True).start()
        if errands.left:
            self._ended.wait(LOOK_AGAIN_S)
        else:
            self._broker.wait_for_deliveries(IDLE_S)

    def _drain(self) -> None:
        until = time.monotonic() + STOP_S
        while self._held() and time.monotonic() < until:
            self._ended.wait(LOOK_AGAIN_S)
            self._ended.clear()
        for errand, cutoff in self._held():
            with contextlib.suppress(RedisUnavailable):  # its lease brings it back
                self._settle(errand, Verdict("back"))
            cutoff.cut()

    def _held(self) -> list[tuple[Errand, Cutoff]]:
        with self._lock:
            return list(self._under_way.items())

    def _run_errand(self, errand: Errand, cutoff: Cutoff) -> None:
        began = time.monotonic()
        try:
            with cutoff:
                verdict = self._tell(errand, cutoff)
            self._settle(errand, verdict, duration_ms=round((time.monotonic() - began) * 1000, 1))
        except RedisUnavailable as error:
            log.warning("redis_away", error=error.message, **errand.about)  # its lease brings it back
        finally:
            with self._lock:
                self._under_way.pop(errand, None)
            self._ended.set()

    def _settle(self, errand: Errand, verdict: Verdict, **told: object) -> None:
        settled = self._broker.settle_delivery(
            self.name, errand, verdict.outcome, status=verdict.status, error=verdict.error, pause_s=verdict.pause_s
        )
        log.info(
            "webhook_tried",
            **errand.about,
            tenant=errand.tenant,
            tries=errand.tries,
            outcome=verdict.outcome if settled == "ok" else settled,
            status=verdict.status,
            error=verdict.error,
            **told,
        )

    def _tell(self, errand: Errand, cutoff: Cutoff) -> Verdict:
        try:
            return self._try(errand, cutoff)
        except RedisUnavailable:
            raise
        except Exception as error:  # no message: pydantic's and others' repeat what a client sent
            log.error("webhook_broke", **errand.about, error=type(error).__name__)
            return self._failure(errand, error="a fault here; it is in the courier's log")

    def _try(self, errand: Errand, cutoff: Cutoff) -> Verdict:
        record = self._broker.view(errand.task_id)
        if record is None or record.request.webhook is None:
            return Verdict("failed", error="its task is gone")
        known = self._broker.webhook_secrets(errand.tenant)
        message = Message(type=f"task.{errand.event}", timestamp=errand.made_at, data=render(record))
        body = message.model_dump_json()
        try:
            target = self._targets.parse(record.request.webhook.url)
            addresses = self._targets.addresses(target)
            answer = self._poster.post(target, addresses, body, signing.headers(errand, known, body), cutoff)
        except (Refused, Unreachable) as failure:
            return self._failure(errand, error=str(failure))
        if answer.accepted:
            return Verdict("delivered", answer.status)
        if answer.gone:
            return Verdict("failed", answer.status, "it is gone, says the receiver")
        return self._failure(errand, answer, f"the receiver answered {answer.status}, which is no success")

    def _failure(self, errand: Errand, answer: Answer | None = None, error: str = "") -> Verdict:
        status = answer and answer.status
        if errand.tries > len(self._pauses_s):
            return Verdict("failed", status, error)
        pause_s = self._pauses_s[errand.tries - 1] * random.uniform(1 - JITTER, 1 + JITTER)
        asked_s = min((answer and answer.retry_after_s) or 0.0, LONGEST_RETRY_AFTER_S)
        return Verdict("again", status, error, max(pause_s, asked_s))
