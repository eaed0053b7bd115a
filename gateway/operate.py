"""What operators do: pause the fleet and let it go on, drain a worker, have one started anew."""

from __future__ import annotations

from collections.abc import Callable

from flask import Response
from pydantic import BaseModel, Field

from common import telemetry
from common.broker import Broker
from common.cards import WorkerCard, slot_of
from common.errors import Forbidden, RedisUnavailable, UnknownWorker
from common.fleet import Slot, Suspended, WorkerView
from gateway import problems
from gateway.admission import caller, open_to
from gateway.api import NO_STORE, Api, json_answer
from gateway.fleet import Overview, Watch

log = telemetry.get_logger()


class WorkerPath(BaseModel):
    """The worker that a call is about."""

    name: str = Field(description="As /api/fleet has it, with or without its last part, which each start makes anew.")


def create(broker: Broker, overview: Overview, watch: Watch) -> Api:
    """Return the routes that steer the fleet."""
    api = Api("operate", __name__, about="Steer the fleet.")
    _add_pause(api, broker, watch)
    _add_workers(api, broker, overview, watch)
    return api


def _add_pause(api: Api, broker: Broker, watch: Watch) -> None:
    refusals = problems.documented(Forbidden, RedisUnavailable)

    @api.post("/api/fleet/pause", responses={"200": Suspended, **refusals})
    @open_to("admin")
    def pause() -> Response:
        """Have workers claim nothing more, as `rq suspend` does. What runs goes on; submits are accepted and wait."""
        broker.suspend()
        log.warning("fleet_paused", by=caller().key_id)
        watch.nudge()
        return json_answer(Suspended(suspended=True), headers=NO_STORE)

    @api.post("/api/fleet/resume", responses={"200": Suspended, **refusals})
    @open_to("admin")
    def resume() -> Response:
        """Let workers claim again, as `rq resume` does."""
        broker.resume()
        log.warning("fleet_resumed", by=caller().key_id)
        watch.nudge()
        return json_answer(Suspended(suspended=False), headers=NO_STORE)


def _add_workers(api: Api, broker: Broker, overview: Overview, watch: Watch) -> None:
    answers = {"200": WorkerView, **problems.documented(Forbidden, UnknownWorker, RedisUnavailable)}

    def order(name: str, event: str, give: Callable[[str], None]) -> Response:
        worker = _find(broker, name).name
        give(worker)
        log.warning(event, worker=worker, by=caller().key_id)
        watch.nudge()
        return json_answer(overview.views([_find(broker, worker)])[0], headers=NO_STORE)

    @api.post("/api/workers/<name>/drain", responses=answers)
    @open_to("admin")
    def drain(path: WorkerPath) -> Response:
        """Have a worker claim nothing more. It finishes what it has, and keeps its models.

        That holds for whoever takes its place, too, until `resume`.
        """
        return order(path.name, "worker_drained", broker.drain)

    @api.post("/api/workers/<name>/resume", responses=answers | {"200": Slot})
    @open_to("admin")
    def undrain(path: WorkerPath) -> Response:
        """Let a worker that was drained claim again, or whoever comes to its slot, should it be gone."""
        name, slot = _find_slot(broker, path.name)
        broker.undrain_slot(slot)
        log.warning("worker_resumed", worker=name, by=caller().key_id)
        watch.nudge()
        return json_answer(Slot(name=name, drained=False), headers=NO_STORE)

    @api.post("/api/workers/<name>/restart", responses=answers)
    @open_to("admin")
    def restart(path: WorkerPath) -> Response:
        """Have a worker finish what it has and end, at its next beat; another takes its place at once, anew."""
        return order(path.name, "worker_restarted", broker.restart)


def _find(broker: Broker, name: str) -> WorkerCard:
    """Return the live worker of this name or slot; raises UnknownWorker."""
    for card in broker.workers():
        if name in (card.name, slot_of(card.name)) and card.state != "lost":
            return card
    raise UnknownWorker("no live worker has this name; /api/fleet shows those there are")


def _find_slot(broker: Broker, name: str) -> tuple[str, str]:
    """Return a live worker's name and its slot, or a drained slot twice where none is; raises UnknownWorker."""
    try:
        worker = _find(broker, name).name
    except UnknownWorker:
        if not (away := broker.drained() & {name, slot_of(name)}):
            raise
        slot = min(away)
        return slot, slot
    return worker, slot_of(worker)
