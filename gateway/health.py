"""Whether the fleet is well and ready, and whether this process lives: what probes and monitors ask for, by anybody."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from flask import Response

from common.broker import Broker
from common.cards import Health, WorkerCard
from common.errors import NoWorker, RedisUnavailable, StorageFull
from common.models import Catalogue
from common.redisstate import RedisState
from common.schemas import Wire
from common.settings import Settings
from common.storage.base import Disk
from gateway import problems
from gateway.admission import open_to
from gateway.api import NO_STORE, Api, json_answer
from gateway.diskguard import DiskGuard
from gateway.store import Reach

STATE_KNOWN_S = 3.0  # what Redis says of its file and its replicas is taken for so long
GPU_GRACE_S = 30.0  # a worker may be so young that its driver has not told of the GPU yet
MIB = 1024 * 1024


class Alive(Wire):
    """GET /live."""

    status: str = "alive"


class Ready(Wire):
    """GET /ready, when it is."""

    status: str = "ready"


class Checkup:
    """Looks at Redis, the workers' cards, the results' disk and storage. One for a process."""

    def __init__(self, broker: Broker, catalogue: Catalogue, disk: DiskGuard, reach: Reach, settings: Settings) -> None:
        self._broker = broker
        self._catalogue = catalogue
        self._disk = disk
        self._reach = reach
        self._settings = settings
        self._began = time.monotonic()
        self._state: RedisState | None = None
        self._state_until = 0.0

    def look(self) -> Health:
        """Return the fleet's health, with what is amiss and what to do about it. No host is named: anybody may ask."""
        try:
            self._broker.probe()  # reads alone would go on where a full disk makes Redis refuse writes
            every, pending, state = self._broker.workers(), self._broker.pending(), self._redis_state()
            disks = self._broker.disks()
        except RedisUnavailable as error:
            return self.without_redis(error)
        cards = [card for card in every if card.state != "lost"]
        reasons = [
            *_gpus(every),
            *_unserved(cards, self._catalogue),
            *(self._disk.reasons() or _disks(disks, self._settings)),
            *self._reach.reasons(),
            *_file(state),
            *_replicas(state, self._settings),
        ]
        return Health(
            status="degraded" if reasons else "healthy",
            reasons=reasons,
            uptime_seconds=self._uptime_s(),
            gpu_memory_used_mb=_gpu_memory_used_mb(cards),
            pending_tasks=pending,
            models_loaded=sorted({name for card in cards for name in card.models_loaded}),
            workers=len(cards),
        )

    def without_redis(self, error: RedisUnavailable) -> Health:
        """Return what is known of the fleet's health while Redis is away."""
        return Health(
            status="unhealthy", reasons=[error.message], uptime_seconds=self._uptime_s(), gpu_memory_used_mb=0,
            pending_tasks=0, models_loaded=[], workers=0,
        )  # fmt: skip

    def ready(self) -> None:
        """Raise what would keep a task that is submitted now from being accepted and run.

        That is RedisUnavailable, StorageFull or NoWorker.
        """
        self._broker.probe()
        self._disk.check()
        if all(card.state in ("loading", "lost") for card in self._broker.workers()):
            raise NoWorker("no worker is alive; start one with: zfleet worker")

    def _uptime_s(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def _redis_state(self) -> RedisState:
        now = time.monotonic()
        if self._state is None or now >= self._state_until:
            self._state = self._broker.redis_state()
            self._state_until = now + STATE_KNOWN_S
        return self._state


def create(checkup: Checkup) -> Api:
    """Return the routes for probes."""
    api = Api("health", __name__, about="Whether the fleet is well, for probes and monitors.")
    unhealthy, come_back = problems.status_of(RedisUnavailable)

    @api.get("/health", responses={"200": Health, str(unhealthy): Health})
    @open_to("public")
    def health() -> Response:
        """Tell how the fleet is: 503 without Redis, else 200, and `degraded` while anything is amiss.

        `reasons` says what, and what to do: no worker, or none that serves a model; a GPU that is gone or silent; a
        disk for results that is nearly full, or mounted read-only; a storage for pictures that does not answer; Redis'
        file that cannot be written; replicas that are away or lag.
        """
        found = checkup.look()
        if found.status == "unhealthy":
            return json_answer(found, unhealthy, {**NO_STORE, **come_back})
        return json_answer(found, headers=NO_STORE)

    @api.get("/ready", responses={"200": Ready, **problems.documented(RedisUnavailable, StorageFull, NoWorker)})
    @open_to("public")
    def ready() -> Response:
        """Tell whether a task submitted now would be accepted and run: Redis, room for results, and a live worker."""
        checkup.ready()
        return json_answer(Ready(), headers=NO_STORE)

    @api.get("/live", responses={"200": Alive})
    @open_to("public")
    def live() -> Response:
        """Tell that this process answers. It asks nobody, so a restart would help where this fails."""
        return json_answer(Alive(), headers=NO_STORE)

    return api


def _gpus(cards: Sequence[WorkerCard]) -> Iterator[str]:
    if lost := sum(card.state == "lost" for card in cards):
        yield f"GPUs lost: {lost}; see /api/workers"
    if silent := len({(card.host, card.device) for card in cards if _is_silent(card)}):
        yield f"GPUs of which their driver tells nothing: {silent}; see /api/workers, and run nvidia-smi on those hosts"


def _is_silent(card: WorkerCard) -> bool:
    age_s = (card.seen_at - card.started_at).total_seconds()
    return card.state != "lost" and card.device.startswith("cuda") and card.gpu is None and age_s > GPU_GRACE_S


def _unserved(cards: Sequence[WorkerCard], catalogue: Catalogue) -> Iterator[str]:
    unserved = [name for name in catalogue if not any(name in card.models for card in cards)]
    if not cards:
        yield "no worker is alive"
    elif unserved:
        yield f"no worker serves {', '.join(unserved)}; tasks for it wait"


def _disks(disks: Mapping[str, Disk], settings: Settings) -> Iterator[str]:
    """Tell of other hosts' disks; where all share one, this process has told of it."""
    limit = settings.disk_resume_percent / 100
    if full := sum(disk.size > 0 and 1 - disk.free / disk.size >= limit for disk in disks.values()):
        yield (
            f"hosts whose disk for results is nearly full: {full}; see zfleet_disk_free_bytes at /metrics, and free "
            "space there or lower ZFLEET_RETENTION_DAYS"
        )


def _file(state: RedisState) -> Iterator[str]:
    if not state.aof_written:
        yield "Redis cannot write its append-only file: a power cut would lose tasks; look at its disk and its log"
    if not state.aof_rewritten:
        yield "Redis cannot rewrite its append-only file, which grows: look at its disk, its memory and its log"


def _replicas(state: RedisState, settings: Settings) -> Iterator[str]:
    online = [replica for replica in state.replicas if replica.online]
    if len(online) < settings.expected_replicas:
        yield (
            f"Redis replicas that follow: {len(online)} of {settings.expected_replicas} (ZFLEET_REDIS_REPLICAS); "
            "look at those that do not, and at their logs"
        )
    silent_s = max((replica.silent_s for replica in online), default=0.0)
    if silent_s > settings.redis_lag_s:
        yield (
            f"a Redis replica has been silent for {silent_s:g} s (more than ZFLEET_REDIS_LAG_S, "
            f"{settings.redis_lag_s:g}): look at it, and at the network between"
        )
    behind_mb = max((replica.behind_bytes for replica in online), default=0) / MIB
    if behind_mb > settings.redis_lag_mb:
        yield (
            f"a Redis replica is {behind_mb:.1f} MiB behind (more than ZFLEET_REDIS_LAG_MB, "
            f"{settings.redis_lag_mb:g}): look at it, and at the network between"
        )


def _gpu_memory_used_mb(cards: Sequence[WorkerCard]) -> int:
    """Return the memory in use on all GPUs; one that several workers share counts once."""
    used = {(card.host, card.gpu.index): card.gpu.memory_used_mb or 0 for card in cards if card.gpu is not None}
    return sum(used.values())
