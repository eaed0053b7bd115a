"""What the fleet is doing: queues, workers, models."""

from __future__ import annotations

from collections.abc import Sequence

from flask import Response
from pydantic import Field

from common.broker import Broker
from common.cards import ModelView, QueueDepth, WorkerCard
from common.errors import Forbidden, RedisUnavailable
from common.models import SIZE_MULTIPLE, Catalogue, ModelSpec
from common.schemas import Priority, Wire
from common.templates import TemplateView
from gateway import problems
from gateway.admission import caller, open_to
from gateway.api import NO_STORE, Api, json_answer
from gateway.templates import Templates


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


class TemplateList(Wire):
    """GET /api/templates."""

    templates: Sequence[TemplateView]


def create(broker: Broker, catalogue: Catalogue, templates: Templates) -> Api:
    """Return the routes for operators and their tools."""
    api = Api("fleet", __name__, about="What the fleet is doing.")
    _add_lists(api, broker, catalogue)
    _add_templates(api, templates)
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


def _add_templates(api: Api, found: Templates) -> None:
    listed = TemplateList(templates=found.views())

    @api.get("/api/templates", responses={"200": TemplateList})
    def templates() -> Response:
        """List the prompt templates, each with what a submit that names it gets."""
        return json_answer(listed, headers=NO_STORE)


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
