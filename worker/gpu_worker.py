"""The worker of one GPU: an RQ worker whose loop is claim, engine, commit, in a process that keeps the model."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

import psutil
from redis import Redis, RedisError
from rq import SimpleWorker
from rq.serializers import JSONSerializer
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from common import storage, tracing
from common.broker import Broker
from common.cards import WorkerCard
from common.connection import connect, patiently
from common.errors import ConfigurationError, DeviceFailed, FleetError, RedisUnavailable
from common.records import Claimed
from common.schemas import PRIORITIES
from common.settings import Settings
from common.storage.base import discard_attempt
from common.telemetry import configure, get_logger
from worker import gpu, memory, traces
from worker.commit import Committer
from worker.engine import Engine
from worker.heartbeat import Heartbeat, Stage
from worker.held import HeldTask
from worker.preparing import Preparer
from worker.pulse import Pulse
from worker.slot import BAD_CONFIGURATION, RECYCLE, RECYCLED

log = get_logger()

IDLE_WAIT_S = 0.5  # the engine looks up this often for a drain
SUSPENDED_WAIT_S = 0.5
REDIS_AWAY_WAIT_S = 0.25
BACKLOG_WAIT_S = 0.05
LEFT_WAIT_S = 0.25  # how soon a worker looks again for tasks that it left
FEEDER_JOIN_S = 0.005
FEED_FAILED_WAIT_S = 1.0
COMMIT_PATIENCE_S = 5.0  # on a drain, for a Redis that is away
ORPHAN_MARGIN_S = 10.0  # beyond the drain time, until a worker without a supervisor ends itself
DEVICE_FAILED = 3  # exit code
START_PATIENCE_S = 30.0
COMMIT_BACKLOG = 8  # tasks waiting for storage beyond this stop further claims
MIB = 1024 * 1024


class GpuWorker(SimpleWorker):
    """Registers with RQ under its own name, so that RQ's tools show it; everything else is zfleet's."""

    def __init__(self, name: str, device: str, settings: Settings, heartbeat: Heartbeat) -> None:
        """`device` is `cpu` or a GPU's index."""
        # no call to Redis may take more of a lease than can be spared
        settings = settings.model_copy(
            update={
                "redis_timeout_s": min(settings.redis_timeout_s, settings.lease_s / 6),
                "redis_patience_s": min(settings.redis_patience_s, settings.lease_s / 3),
            }
        )
        self.settings = settings
        self.catalogue = settings.catalogue()
        self.device = device
        queues = [f"{model}.{priority}.default" for model in self.catalogue for priority in PRIORITIES]
        connection = connect(settings.redis_url, timeout_s=settings.redis_timeout_s, decode=False)
        super().__init__(queues, name=name, connection=connection, serializer=JSONSerializer)
        self.worker_ttl = int(settings.lease_s)
        self.vitals = heartbeat
        self.gpus = gpu.Watch([] if device == gpu.CPU else [int(device)], every_s=settings.beat_s).start()
        self.results = storage.open_storage(settings)
        self.broker = Broker(settings, void=self._discard)
        self.residency = memory.residency(settings, self.catalogue, device, self._models_changed)
        self.engine = Engine(
            models=self.residency,
            batch_limits={name: settings.max_batch or spec.max_batch for name, spec in self.catalogue.items()},
            retire=self._retire,
            stepped=lambda: self.pulse.stepped(),
            run_limits=_run_limits(settings),
            fence_after_s=settings.lease_s * 2 / 3,
            heartbeat=heartbeat,
        )
        self.committer = Committer(name, self.broker, self.results, committed=self._committed, heartbeat=heartbeat)
        self.preparer = Preparer(self.results, settings.lora_dir, self.committer.reading)
        self.pulse = Pulse(
            name,
            Broker(settings),  # with connections of its own
            beat_s=settings.beat_s,
            card=self.card,
            held=self.held,
            register=self.register_birth,
            restart=self._restart,
            stuck=self._is_stuck,
            counts=self.engine.counts,
        )
        self._held: dict[int, HeldTask] = {}
        self._committing = 0
        self._lock = threading.Lock()
        self._draining = threading.Event()
        self._renewing = False  # an operator wants a fresh one in its place
        self._leave_at = math.inf
        self._loading = True
        self._images_done = 0
        self._started_at = datetime.now(UTC)
        self._process = psutil.Process()

    def _set_connection(self, connection: Redis) -> Redis:
        """Keep our own short time-outs; RQ would wait minutes on a Redis that hangs."""
        return connection

    def _set_ip_address(self, connection: Redis) -> None:
        """Leave it unknown: RQ would look it up by CLIENT LIST, which shows everybody's connections."""
        self.ip_address = "unknown"

    def run(self) -> int:
        """Load, register, and work until drained; returns the process's exit code."""
        self.register_birth()
        self.pulse.start()
        feeder = threading.Thread(target=self._feed, name="feeder", daemon=True)
        try:
            self.vitals.loading()
            self.residency.prewarm()
            self.vitals.at(Stage.IDLE)
            self._loading = False
            self.pulse.beat_soon()
            log.info("worker_ready", models=list(self.residency.loaded), capacity=self.engine.capacity)
            feeder.start()
            while not self._draining.is_set():
                self.engine.turn(IDLE_WAIT_S)
                self._look_after_models()
            self._drain(feeder)
        except DeviceFailed as error:
            log.error("device_failed", message=error.message)
            self._draining.set()
            self.engine.abandon()
            self.committer.close(abandon_after_s=COMMIT_PATIENCE_S)
            return DEVICE_FAILED
        finally:
            self.pulse.stop()
        with contextlib.suppress(RedisError):  # the supervisor's burial takes the name away as well
            self.register_death()
        log.info("worker_stopped", images_done=self._images_done)
        return RECYCLED if self.residency.leaked or self._renewing else 0

    def drain(self, grace_s: float) -> None:
        """Claim nothing more, finish what has begun within this time, give back the rest, then stop.

        For a signal handler of the main thread.
        """
        self._leave_at = time.monotonic() + grace_s
        self._draining.set()
        if self._loading:
            raise SystemExit(RECYCLED if self._renewing else 0)  # nothing is held yet, and loading may take minutes
        self.engine.hurry()

    def _restart(self) -> None:
        """Drain as on SIGTERM, in the main thread, but leave as one whose place is to be taken at once."""
        if not self._draining.is_set():
            self._renewing = True
            os.kill(os.getpid(), signal.SIGTERM)

    def card(self) -> WorkerCard:
        """Describe this worker as it is now."""
        held = self.held()
        state: Literal["loading", "idle", "busy", "draining"] = "busy" if held else "idle"
        if self._draining.is_set():
            state = "draining"
        elif self._loading:
            state = "loading"
        return WorkerCard(
            name=self.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=state,
            device=self.device if self.device == gpu.CPU else f"cuda:{self.device}",
            gpu=None if self.device == gpu.CPU else self.gpus.reading(int(self.device)),
            models=list(self.catalogue if self._loading else self.residency.offered),
            models_loaded=list(self.residency.loaded),
            max_pixels=self.residency.largest,
            loras=self.preparer.loras,
            counters=self.residency.counters(),
            capacity=self.engine.capacity,
            running=[task.claimed.task_id for task in held],
            images_done=self._images_done,
            rss_mb=self._process.memory_info().rss // MIB,
            started_at=self._started_at,
            seen_at=datetime.now(UTC),
        )

    def held(self) -> Sequence[HeldTask]:
        """Return every task whose lease is ours, from its claim until its commit is through."""
        with self._lock:
            return list(self._held.values())

    def _is_stuck(self, task: HeldTask) -> bool:
        """Whether what this task waits for stands still: the storage once it has an outcome, the device before, and
        either before it has begun.
        """
        store, device = self.committer.standing_s(), self.vitals.standing_s()
        waits_for = (store,) if task.outcome else (device,) if task.began else (store, device)
        return max(waits_for) > self.settings.step_limit_s

    # The feeder's thread

    def _feed(self) -> None:
        while not self._draining.is_set():
            self.preparer.look()
            room = self.engine.await_room(IDLE_WAIT_S)
            if not room:
                continue
            standing_s = max(self.vitals.standing_s(), self.committer.standing_s())
            if standing_s > self.settings.step_limit_s:  # what it holds is being lost; take no more
                self._draining.wait(IDLE_WAIT_S)
                continue
            if self._committing > COMMIT_BACKLOG + self.engine.capacity:
                self._draining.wait(BACKLOG_WAIT_S)
                continue
            try:
                self._claim(room)
            except RedisUnavailable:
                self._draining.wait(REDIS_AWAY_WAIT_S)
            except Exception as error:  # a worker that beats but claims nothing would be worse than any error
                log.error("feed_failed", error=type(error).__name__)
                self._draining.wait(FEED_FAILED_WAIT_S)

    def _claim(self, room: int) -> None:
        """Claim up to so many pictures, or wait for some to come."""
        models, resident, busy = self.residency.offered, self.residency.loaded, not self.engine.idle
        asked = time.monotonic()
        bound_s = self.settings.resident_wait_s
        if asked - self.residency.swapped_at < bound_s:  # what has just made room for another has its turn later
            bound_s = math.inf
        claim = self.broker.claim(
            self.name, self.device, models, room,
            resident=resident, bound_s=bound_s, busy=busy, largest=self._largest(), give_up=self._draining.is_set,
        )  # fmt: skip
        # the last of its tries was sent no earlier than that: each waits for a connection, and for a reply
        leased_at = max(asked, time.monotonic() - 2 * self.settings.redis_timeout_s)
        for claimed in claim.tasks:
            self._take(claimed, leased_at)
        if claim.suspended or not models:
            self._draining.wait(SUSPENDED_WAIT_S)
        elif not claim.tasks:
            self._wait([model for model in models if model not in claim.left], bool(claim.left))

    def _wait(self, bells: Sequence[str], left: bool) -> None:
        """Wait at these bells; what it has `left`, and rung for, is for others, and later perhaps for itself."""
        if not left:
            self.broker.wait(bells)
        elif bells:
            self.broker.wait(bells, LEFT_WAIT_S)
        else:
            self._draining.wait(LEFT_WAIT_S)

    def _largest(self) -> dict[str, int]:
        """Return the pixels of the largest picture by model, where another worker has, or may have, memory for more.

        What none has memory for it takes as before, and says so by failing it: a task must not wait for ever.
        """
        found = {}
        for model, pixels in self.residency.largest.items():
            if pixels < self.catalogue[model].max_pixels:
                most = self.broker.limits(model).max_pixels
                if most is None or most > pixels:
                    found[model] = pixels
        return found

    def _take(self, claimed: Claimed, leased_at: float) -> None:
        deadline = time.monotonic() + claimed.deadline_in_s if claimed.deadline_in_s else None
        trace = traces.begin(claimed)
        task = HeldTask(claimed=claimed, deadline=deadline, alone=claimed.alone, leased_at=leased_at, trace=trace)
        with self._lock:
            self._held[id(task)] = task
        log.info("attempt_started", **task.about, model=claimed.request.model, queued_ms=claimed.queued_ms)
        if self.preparer.prepare(task):
            self.engine.offer(task)
        else:
            self._retire(task)
        with contextlib.suppress(RedisError):  # then it is learnt with the next one
            self._learn(claimed.queue)

    def _learn(self, queue: str) -> None:
        """Let RQ's tools show this worker at a queue it did not know, as when a new tenant appears."""
        if queue not in self.queue_names():
            self.queues.append(self.queue_class(queue, connection=self.connection, serializer=self.serializer))
            self.connection.sadd(WORKERS_BY_QUEUE_KEY % queue, self.key)

    # The engine's and the committers' threads

    def _look_after_models(self) -> None:
        for model in self.residency.idle():
            self.vitals.loading()
            self.residency.unload(model, "idle")
            self.vitals.at(Stage.IDLE)
        if self.residency.leaked and not self._draining.is_set():
            self.drain(math.inf)

    def _models_changed(self) -> None:
        self.vitals.holds_memory(self.residency.memory_used_mb())
        self.vitals.has_models(self.residency.loaded, self.residency.changes)
        self.pulse.beat_soon()

    def _retire(self, task: HeldTask) -> None:
        with self._lock:
            self._committing += 1
        self.committer.commit(task)

    def _committed(self, task: HeldTask) -> None:
        with self._lock:
            self._held.pop(id(task), None)
            self._committing -= 1
            if task.outcome == "succeeded":
                self._images_done += task.claimed.request.n
                self.vitals.has_done(self._images_done)

    def _discard(self, task_id: str, fence: int) -> None:
        with contextlib.suppress(FleetError):  # a sweep will find it
            discard_attempt(self.results, self.name, task_id, fence)

    def _drain(self, feeder: threading.Thread) -> None:
        log.info("worker_draining", held=len(self._held))
        while feeder.is_alive():  # it may still be waiting at the bell
            self.engine.turn(0)
            feeder.join(FEEDER_JOIN_S)
        self.engine.release(begun=False)
        while not self.engine.idle and time.monotonic() < self._leave_at:
            self.engine.turn(0)
        self.engine.release(begun=True)
        left_s = max(0.0, min(self._leave_at - time.monotonic(), self.settings.drain_s))
        self.committer.close(abandon_after_s=left_s + COMMIT_PATIENCE_S)


def main(name: str, device: str, settings: Settings, parent_pipe: int | None, heartbeat: int = -1) -> int:
    """Run one worker until SIGTERM, or until the supervisor at the other end of `parent_pipe` is gone.

    `heartbeat` is the descriptor of the memory that the supervisor reads; without one there is none.
    """
    configure(settings, "worker", worker=name, gpu=device)
    tracing.configure("worker", name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    try:
        worker = patiently(
            lambda: GpuWorker(name, device, settings, Heartbeat(heartbeat)),
            patience_s=START_PATIENCE_S,
            timeout_s=settings.redis_timeout_s,
        )
    except FleetError as error:
        return _failed(error)
    signal.signal(signal.SIGTERM, lambda *_: worker.drain(settings.drain_s))
    signal.signal(RECYCLE, lambda *_: worker.drain(math.inf))
    if parent_pipe is not None:
        patience_s = settings.drain_s + ORPHAN_MARGIN_S
        threading.Thread(target=_watch_parent, args=(parent_pipe, patience_s), name="parent", daemon=True).start()
    try:
        return worker.run()
    except FleetError as error:
        return _failed(error)
    finally:
        tracing.close()


def _failed(error: FleetError) -> int:
    log.error("worker_failed", code=error.code, message=error.message)
    return BAD_CONFIGURATION if isinstance(error, ConfigurationError) else 1


def _watch_parent(pipe: int, patience_s: float) -> None:
    """Drain when the supervisor is gone: the read ends only when nobody holds the other end any more."""
    while os.read(pipe, 1):
        pass
    log.warning("supervisor_gone")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience_s)  # a main thread that hangs on the device never sees the signal, and nobody else would end it
    os.kill(os.getpid(), signal.SIGKILL)


def _run_limits(settings: Settings) -> dict[str, float]:
    """Return for each model that has one its limit in seconds."""
    specs = settings.catalogue().values() if settings.run_limits else ()
    return {spec.name: spec.run_limit_s for spec in specs if spec.run_limit_s is not None}
