"""GET /metrics: figures for Prometheus, read from Redis at each scrape, so that every process tells the same.

A metric is a function of one of this package's modules that takes a Look and yields families; SOURCES lists them.
Labels are models, priorities, routes, hosts and the like, of which there are few and whose names are the operator's:
never a tenant, a key or a task.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from flask import Response
from flask_openapi3.types import ResponseDict
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from common.broker import Broker
from common.errors import Forbidden, RedisUnavailable, Unauthenticated
from gateway import problems
from gateway.admission import open_to
from gateway.api import NO_STORE, Api
from gateway.metrics import calls, fleet, tasks, workers
from gateway.metrics.look import Look

SOURCES: tuple[Callable[[Look], Iterator[Metric]], ...] = (
    *calls.SOURCES,
    *fleet.SOURCES,
    *tasks.SOURCES,
    *workers.SOURCES,
)


def create(broker: Broker, models: Collection[str], tell: Callable[[], None]) -> Api:
    """Return the route for Prometheus. `tell` is called first, to add what this process has counted by itself."""
    api = Api("metrics", __name__, about="Figures for Prometheus.")
    registry = CollectorRegistry()
    registry.register(FleetCollector(broker, models))
    described: ResponseDict = {
        "200": {
            "description": "The figures, in Prometheus' text format.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        **problems.documented(Unauthenticated, Forbidden, RedisUnavailable),
    }

    @api.get("/metrics", responses=described)
    @open_to("admin")
    def metrics() -> Response:
        """Tell the fleet's figures to Prometheus."""
        tell()
        return Response(generate_latest(registry), headers=NO_STORE, content_type=CONTENT_TYPE_LATEST)

    return api


class FleetCollector(Collector):
    """What Redis knows of the fleet as a whole. Collecting raises RedisUnavailable."""

    def __init__(self, broker: Broker, models: Collection[str]) -> None:
        self._broker = broker
        self._models = models

    def describe(self) -> Iterator[Metric]:
        """Name nothing ahead: the registry would collect once for that, before anybody asks."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        look = Look.at(self._broker, self._models)
        for source in SOURCES:
            yield from source(look)
