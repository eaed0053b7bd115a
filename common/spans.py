"""Spans of OpenTelemetry, sent by OTLP over HTTP from a thread of their own. Loaded only where tasks are traced.

The SDK reads its OTEL_ variables itself: where to, the sampler, the limits of its queue. What finds that queue full is
dropped; nobody ever waits for a collector.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

CLOSE_S = 3.0  # for what has not been sent when a process stops
TRACEPARENT = "traceparent"  # of W3C's Trace Context
SERVER, CONSUMER, INTERNAL = SpanKind.SERVER, SpanKind.CONSUMER, SpanKind.INTERNAL

Attributes = Mapping[str, str | int | float | bool]
NOTHING: Attributes = {}

_W3C = TraceContextTextMapPropagator()


class Span:
    """A span that has begun, and is sent once it has ended."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self.carried = False  # whether some task has taken its traceparent along

    @property
    def context(self) -> Context:
        """What its children are begun with."""
        return trace.set_span_in_context(self._span)

    def carry(self) -> str:
        """Return its traceparent for a task to take along; '' where the sampler has left it out."""
        self.carried = True
        carrier: dict[str, str] = {}
        if self._span.is_recording():
            _W3C.inject(carrier, self.context)
        return carrier.get(TRACEPARENT, "")

    def end(
        self, *, at_ns: int | None = None, name: str = "", error: str = "", attributes: Attributes = NOTHING
    ) -> None:
        """End it, now or at a moment in nanoseconds since 1970; `error` is the code of what went wrong."""
        if name:
            self._span.update_name(name)
        self._span.set_attributes(attributes)
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(at_ns)


class Spans:
    """One process's spans. Safe to share between threads and greenlets."""

    def __init__(self, role: str, instance: str = "") -> None:
        own = Resource(
            {
                "service.name": f"zfleet-{role}",
                "service.namespace": "zfleet",
                "service.instance.id": instance or f"{socket.gethostname()}.{role}.{os.getpid()}",
                "host.name": socket.gethostname(),
            }
        )
        resource = Resource.create().merge(own).merge(OTELResourceDetector().detect())  # the operator's word goes last
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("zfleet")
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # it would log each of its own tries

    def start(
        self,
        name: str,
        parent: str | Span = "",
        *,
        kind: SpanKind = INTERNAL,
        at_ns: int | None = None,
        attributes: Attributes = NOTHING,
    ) -> Span:
        """Begin a span, now or at a moment in nanoseconds since 1970; `parent` may be a traceparent, '' for none."""
        # never the context of whoever calls: a library's spans are not ours
        context = parent.context if isinstance(parent, Span) else _W3C.extract({TRACEPARENT: parent}, Context())
        return Span(self._tracer.start_span(name, context, kind, attributes, start_time=at_ns))

    def close(self) -> None:
        """Send what has ended, as far as that takes no longer than CLOSE_S."""
        sender = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        sender.start()
        sender.join(CLOSE_S)


def collector_answers() -> bool:
    """Return whether the collector takes a message, in which there is no span."""
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # the answer is all there is to say
    return OTLPSpanExporter().export(()) is SpanExportResult.SUCCESS
