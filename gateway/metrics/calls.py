"""Calls over HTTP, of all gateways together."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from common.histograms import CALL_SECONDS, Bounds
from gateway.metrics.look import MICRO, Look, counter


def requests(look: Look) -> Iterator[Metric]:
    """Yield how many requests were answered, by the route's rule."""
    about = "Requests that were answered, by the rule of their route; unmatched: no route has such a path or method."
    yield from counter("zfleet_http_requests_total", about, ["route", "method", "status"], look.counted("requests"))


def submit_duration(look: Look) -> Iterator[Metric]:
    """Yield how long submits took to be accepted."""
    about = "From the head of a request to its answer, of those that were accepted as tasks (202)."
    yield from look.histogram("submit", Bounds(CALL_SECONDS), ("zfleet_submit_duration_seconds", about), unit=MICRO)


SOURCES = (requests, submit_duration)
