"""Whether tasks are traced, by OpenTelemetry: off unless its OTEL_ variables ask for it, and then nothing is loaded.

A trace is one task's: the request that made it, and as far as workers tell, each attempt. `common/spans.py` makes it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from common.errors import ConfigurationError
from common.settings import traces_wanted

if TYPE_CHECKING:
    from common.spans import Span, Spans

_spans: Spans | None = None
_request: ContextVar[Span | None] = ContextVar("request", default=None)


def configure(role: str, instance: str = "") -> None:
    """Trace from now on, if that is asked for. `instance` names this process among those of its role.

    Raises ConfigurationError where traces are wanted that cannot be had.
    """
    global _spans
    if not traces_wanted():
        return
    try:
        from common.spans import Spans
    except ImportError:
        message = (
            "OTEL_ variables ask for traces, which need OpenTelemetry: pip install 'zfleet[tracing]', or unset them"
        )
        raise ConfigurationError(message) from None
    _spans = Spans(role, instance)


def spans() -> Spans | None:
    """Return what makes spans; None while nothing is traced."""
    return _spans


def serve(span: Span | None) -> None:
    """Note which span is that of the request being served in this thread or greenlet; None: none any more."""
    _request.set(span)


def carried() -> str:
    """Return the traceparent for a task that the current request makes, which makes it one to tell of; '' for none."""
    if _spans is None or (span := _request.get()) is None:
        return ""
    return span.carry()


def close() -> None:
    """Send what is still to be sent, if it can be within seconds. For a process that stops."""
    if _spans is not None:
        _spans.close()
