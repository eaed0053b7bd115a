"""What the fleet is doing and whether it is well: queues, workers, models, health."""

from __future__ import annotations

import time
from collections.abc import Sequence

from flask import Response
from pydantic import Field

from common.broker import Broker
from common.cards import Health, ModelView, QueueDepth, WorkerCard
from common.errors import Forbidden, NoWorker, RedisUnavailable, StorageFull
from common.models import SIZE_MULTIPLE, Catalogue, ModelSpec
from common.schemas import Priority, Wire
from gateway import problems
from gateway.admission import caller, open_to
from gateway.api import NO_STORE, Api, json_answer
from gateway.diskguard import DiskGuard


class Queues(Wire):
    """GET /api/queue."""

    queues: Sequence[QueueDepth]


class Workers(Wire):
    """GET /api/workers."""

    workers: Sequence[WorkerCard]


class Models(Wire):
    """GET /api/models."""

    models: Sequence[ModelView]


class Me(Wire):
    """GET /api/me: what the caller's key is good for."""

    tenant: str
    admin: bool
    key_id: str | None = Field(description="Null on a fleet that wants no key.")
    priority_max: Priority


class Templates(Wire):
    """GET /api/templates: none can be installed yet."""

    templates: Sequence[str] = ()


class Ready(Wire):
    """GET /ready, when it is."""

    status: str = "ready"


def create(broker: Broker, catalogue: Catalogue, disk: DiskGuard) -> Api:
    """Return the routes for operators and their tools."""
    api = Api("fleet", __name__, about="What the fleet is doing, and whether it is well.")
    _add_lists(api, broker, catalogue)
    _add_health(api, broker, catalogue, disk)
    return api


def _add_lists(api: Api, broker: Broker, catalogue: Catalogue) -> None:
    away = problems.documented(RedisUnavailable)

    @api.get("/api/queue", responses={"200": Queues, **away})
    def queue() -> Response:
        """List your queues (with the admin scope everybody's): depth, running tasks and the age of the oldest."""
        mine = [queue for queue in broker.queues() if caller().may_see(queue.tenant)]
        return json_answer(Queues(queues=mine), headers=NO_STORE)

    @api.get("/api/workers", responses={"200": Workers, **away, **problems.documented(Forbidden)})
    @open_to("admin")
    def workers() -> Response:
        """List the live workers as they last described themselves."""
        return json_answer(Workers(workers=broker.workers()), headers=NO_STORE)

    @api.get("/api/me", responses={"200": Me})
    def me() -> Response:
        """Tell who is asking, and with what rights."""
        who = caller()
        found = Me(tenant=who.tenant, admin=who.admin, key_id=who.key_id or None, priority_max=who.priority_max)
        return json_answer(found, headers=NO_STORE)

    @api.get("/api/models", responses={"200": Models, **away})
    def models() -> Response:
        """List the models, each with its defaults, its limits and how many workers serve it now."""
        return json_answer(Models(models=model_views(catalogue, broker.workers())), headers=NO_STORE)

    @api.get("/api/templates", responses={"200": Templates})
    def templates() -> Response:
        """List the prompt templates."""
        return json_answer(Templates(), headers=NO_STORE)


def _add_health(api: Api, broker: Broker, catalogue: Catalogue, disk: DiskGuard) -> None:
    began = time.monotonic()
    unhealthy, come_back = problems.status_of(RedisUnavailable)
    unready = (RedisUnavailable, StorageFull, NoWorker)

    @api.get("/health", responses={"200": Health, str(unhealthy): Health})
    @open_to("public")
    def health() -> Response:
        """Tell how the fleet is: 503 without Redis, else 200; `degraded` without a worker or without room for results.

        `reasons` says why it is not healthy.
        """
        found = look(broker, catalogue, disk, time.monotonic() - began)
        if found.status == "unhealthy":
            return json_answer(found, unhealthy, {**NO_STORE, **come_back})
        return json_answer(found, headers=NO_STORE)

    @api.get("/ready", responses={"200": Ready, **problems.documented(*unready)})
    @open_to("public")
    def ready() -> Response:
        """Tell whether a task submitted now would be accepted and run: Redis, room for results, and a live worker."""
        broker.probe()
        disk.check()
        if all(card.state in ("loading", "lost") for card in broker.workers()):
            raise NoWorker("no worker is alive; start one with: zfleet worker")
        return json_answer(Ready(), headers=NO_STORE)


def look(broker: Broker, catalogue: Catalogue, disk: DiskGuard, uptime_s: float) -> Health:
    """Return the fleet's health as Redis, the workers' cards and the results' disk tell it."""
    try:
        broker.probe()  # reads alone would go on where a full disk makes Redis refuse writes
        cards, pending = broker.workers(), broker.pending()
    except RedisUnavailable as error:
        return Health(
            status="unhealthy", reasons=[error.message], uptime_seconds=round(uptime_s, 3), gpu_memory_used_mb=0,
            pending_tasks=0, models_loaded=[], workers=0,
        )  # fmt: skip
    lost = sum(card.state == "lost" for card in cards)  # which, is for operators: anybody may ask for this
    reasons = [f"GPUs lost: {lost}; see /api/workers"] if lost else []
    cards = [card for card in cards if card.state != "lost"]
    unserved = [name for name in catalogue if not any(name in card.models for card in cards)]
    if not cards:
        reasons.append("no worker is alive")
    elif unserved:
        reasons.append(f"no worker serves {', '.join(unserved)}; tasks for it wait")
    if full := disk.reason():
        reasons.append(full)
    return Health(
        status="degraded" if reasons else "healthy",
        reasons=reasons,
        uptime_seconds=round(uptime_s, 3),
        gpu_memory_used_mb=_gpu_memory_used_mb(cards),
        pending_tasks=pending,
        models_loaded=sorted({name for card in cards for name in card.models_loaded}),
        workers=len(cards),
    )


def model_views(catalogue: Catalogue, cards: Sequence[WorkerCard]) -> list[ModelView]:
    """Return the catalogue as clients see it."""
    shown = ModelView.model_fields.keys() - {"default", "loras", "size_multiple", "workers"}
    return [
        ModelView(
            **spec.model_dump(include=shown),
            default=spec is catalogue.default,
            loras=_loras(spec, cards),
            size_multiple=SIZE_MULTIPLE,
            workers=sum(spec.name in card.models for card in cards),
        )
        for spec in catalogue.values()
    ]


def _loras(spec: ModelSpec, cards: Sequence[WorkerCard]) -> list[str]:
    serving = [card for card in cards if spec.takes_loras and spec.name in card.models]
    return sorted({name for card in serving for name in card.loras or ()})


def _gpu_memory_used_mb(cards: Sequence[WorkerCard]) -> int:
    """Return the memory in use on all GPUs; one that several workers share counts once."""
    used = {(card.host, card.gpu.index): card.gpu.memory_used_mb or 0 for card in cards if card.gpu is not None}
    return sum(used.values())
