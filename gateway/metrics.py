"""GET /metrics: figures for Prometheus, read from Redis at each scrape, so that every process tells the same.

A metric is a function of this module that takes the broker and yields families; SOURCES lists them. Labels are models,
priorities and the like, of which there are few and whose names are the operator's: never a tenant, a key or a task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from flask import Response
from flask_openapi3.types import ResponseDict
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from common.broker import Broker
from common.errors import Forbidden, RedisUnavailable, Unauthenticated
from gateway import problems
from gateway.admission import open_to
from gateway.api import NO_STORE, Api

Source = Callable[[Broker], Iterator[Metric]]


def create(broker: Broker) -> Api:
    """Return the route for Prometheus."""
    api = Api("metrics", __name__, about="Figures for Prometheus.")
    registry = CollectorRegistry()
    registry.register(FleetCollector(broker))
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
        return Response(generate_latest(registry), headers=NO_STORE, content_type=CONTENT_TYPE_LATEST)

    return api


class FleetCollector(Collector):
    """What Redis knows of the fleet as a whole. Collecting raises RedisUnavailable."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def collect(self) -> Iterator[Metric]:
        for source in SOURCES:
            yield from source(self._broker)


def queue_tasks(broker: Broker) -> Iterator[Metric]:
    """Yield how many tasks wait, by model and priority."""
    family = GaugeMetricFamily("zfleet_queue_tasks", "Tasks that wait for a worker.", labels=["model", "priority"])
    waiting: Counter[tuple[str, str]] = Counter()
    for queue in broker.queues():
        waiting[queue.model, queue.priority] += queue.queued
    for (model, priority), tasks in sorted(waiting.items()):
        family.add_metric([model, priority], tasks)
    yield family


def eta_error_ratio(broker: Broker) -> Iterator[Metric]:
    """Yield how far off the estimates were that submits were answered with."""
    family = HistogramMetricFamily(
        "zfleet_eta_error_ratio",
        "|actual - estimated| / actual time from submit to result, of tasks that succeeded.",
        labels=["model"],
    )
    for model, errors in sorted(broker.eta_errors().items()):
        family.add_metric([model], buckets=list(errors.buckets), sum_value=errors.sum)
    yield family


SOURCES: tuple[Source, ...] = (queue_tasks, eta_error_ratio)
