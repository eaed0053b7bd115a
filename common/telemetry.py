"""Logs as JSON lines: who did what, for which request and task, in how many ms. Never a prompt, key or body."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import structlog
from pydantic_core import to_json

from common.logfiles import LogFile, open_log
from common.settings import Settings

FORBIDDEN = frozenset(
    {"prompt", "negative_prompt", "body", "request", "authorization", "api_key", "key", "password", "redis_url"}
)


def configure(settings: Settings, role: str, **bound: str) -> None:
    """Send this process's logs, structlog's and the libraries', to stderr or to `log_dir`/<role>-<slot>.log.

    `bound` (worker, gpu …) stands on every line. Each process takes the first free slot, so no two rotate one file.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _redact,
    ]
    rendered: list[structlog.typing.Processor] = [
        structlog.processors.format_exc_info,
        _as_json,
    ]
    renderer = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
    )
    handler = _handler(settings.log_dir, role)
    handler.setFormatter(renderer)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for noisy in ("rq", "urllib3", "PIL", "werkzeug", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)  # as lines of the log, by way of its logger py.warnings
    logging.getLogger("retrying").setLevel(logging.CRITICAL)  # it would log a traceback for each try
    structlog.configure(
        processors=[*shared, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(settings.log_level.upper())),
        logger_factory=_Lines,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    _BOUND.clear()
    _BOUND.update(role=role, **bound)


_BOUND: dict[str, str] = {}


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """Return a logger; call it with an event name and fields, as in `log.info("task_finished", task_id=…)`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


@contextlib.contextmanager
def lines_about(**ids: str | int) -> Iterator[None]:
    """Have every line that this thread logs within the block carry these fields."""
    with structlog.contextvars.bound_contextvars(**ids):
        yield


class _Lines:
    """Where rendered lines go: to the root logger's handler, without a LogRecord, which costs three times the line."""

    def msg(self, line: str) -> None:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, LogFile):
                handler.append(line)
            elif isinstance(handler, logging.StreamHandler):
                with handler.lock or contextlib.nullcontext(), contextlib.suppress(OSError, ValueError):
                    handler.stream.write(line + "\n")
                    handler.flush()

    debug = info = warning = error = critical = msg


def _as_json(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    return to_json(event, fallback=repr).decode()  # pydantic's: a third of the time that json.dumps takes


def _redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Drop what must never be logged, should a caller pass it; add what this process is."""
    for name in FORBIDDEN & event.keys():
        event[name] = "(withheld)"
    for name, value in _BOUND.items():
        event.setdefault(name, value)
    return event


def _handler(log_dir: Path | None, role: str) -> logging.Handler:
    if log_dir is None:
        return logging.StreamHandler(sys.stderr)
    return open_log(log_dir, lambda slot: f"{role}-{slot}.log")
