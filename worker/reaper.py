"""Takes back what dead and silent workers held, puts straight what stands nowhere, and notes how the fleet stands. A
supervisor ticks it.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from common.broker import Broker
from common.errors import RedisUnavailable, StorageError
from common.records import Hold, Reaped
from common.schemas import TaskError
from common.storage.base import BaseStorage, discard_attempt
from common.telemetry import get_logger
from worker import traces
from worker.heartbeat import InHand
from worker.tidying import Tidying

log = get_logger()

REAP_INTERVAL_S = 1.0
RECONCILE_INTERVAL_S = 30.0  # of the whole fleet
DISK_INTERVAL_S = 15.0
TIDYING_S = 2.0  # at the end, for a storage that may hang


class Burial(NamedTuple):
    """A dead worker: the tasks that may have killed it, those that stood by, and those it was killed for itself."""

    worker: str
    suspects: Sequence[InHand] = ()
    bystanders: Sequence[InHand] = ()
    tripped: Sequence[InHand] = ()
    crashed: bool = True  # nobody had asked it to leave


class Reaper:
    """One machine's part in keeping the fleet's books. No call waits for a Redis that is away."""

    def __init__(self, broker: Broker, storage: BaseStorage) -> None:
        """`broker` should not be patient, as the supervisor has more to do."""
        self._broker = broker
        self._storage = storage
        self._tidying = Tidying()
        self._dead: list[Burial] = []
        self._away = False
        self._next_reap = self._next_reconcile = self._next_disk = 0.0

    def bury(self, burial: Burial) -> None:
        """Take back a dead worker's runs: now, or when Redis is there again."""
        self._dead.append(burial)
        self.tick()

    def tick(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        try:
            while self._dead:
                self._take_back(self._dead[0])
                self._dead.pop(0)
            if now >= self._next_reap:
                self._next_reap = now + REAP_INTERVAL_S
                self._note(self._broker.reap())
                for expired in self._broker.expire():
                    log.info("task_expired", **expired._asdict())
                    traces.tell_of_the_expired(self._broker, expired.task_id)
                self._broker.sample()
            if now >= self._next_disk:
                self._next_disk = now + DISK_INTERVAL_S
                self._tidying.do(self._note_disk)
            if now >= self._next_reconcile:
                self._next_reconcile = now + RECONCILE_INTERVAL_S
                for put_back in self._broker.reconcile(RECONCILE_INTERVAL_S * 0.9):
                    log.warning("task_put_back", **put_back._asdict())
            self._away = False
        except RedisUnavailable as error:
            if not self._away:
                log.warning("redis_away", reason=error.message)
            self._away = True

    def _take_back(self, burial: Burial) -> None:
        for task in burial.tripped:
            message = "stopped: its step stood still on the device beyond the time it had"
            error = TaskError(code="deadline_exceeded", message=message)
            ended = self._broker.finish(
                burial.worker, Hold(task.task_id, task.fence), "failed", error=error, fuse=task.cause
            )
            outcome = "lost" if ended == "lost" else "failed"
            log.info("attempt_ended", **task.about, worker=burial.worker, outcome=outcome, code=error.code)
            traces.tell_of_the_dead(self._broker, task.task_id, task.fence)
        suspects, bystanders = ([task.task_id for task in group] for group in (burial.suspects, burial.bystanders))
        self._note(self._broker.reap(burial.worker, suspects, bystanders, crashed=burial.crashed))

    def finish(self) -> None:
        """Let what is going on at the storage come to its end, if it does so soon."""
        self._tidying.finish(TIDYING_S)

    def _note(self, reaped: list[Reaped]) -> None:
        for task in reaped:
            log.warning("task_reaped", **_about(task), outcome=task.outcome)
            traces.tell_of_the_dead(self._broker, task.task_id, task.fence)
            self._tidying.do(functools.partial(self._discard, task))  # stored, perhaps, and never committed

    # In the thread that may hang

    def _note_disk(self) -> None:
        with contextlib.suppress(StorageError, RedisUnavailable):  # which the gateway tells, and whoever writes there
            if disk := self._storage.disk():
                self._broker.note_disk(socket.gethostname(), disk)

    def _discard(self, task: Reaped) -> None:
        try:
            discard_attempt(self._storage, task.worker, task.task_id, task.fence)
        except StorageError as error:
            log.warning("attempt_not_discarded", **_about(task), error=error.message)


def _about(task: Reaped) -> dict[str, str | int]:
    return {"task_id": task.task_id, "request_id": task.request_id, "attempt": task.fence, "worker": task.worker}
