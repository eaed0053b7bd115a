"""What schemathesis does differently here; it loads this file by the configuration that run.py writes."""

from __future__ import annotations

import json
from typing import Any

import schemathesis

# 5xx that the request or the worker at hand asks for: `reject_if_late`, tasks that fail, a client that waits no longer
ASKED_FOR = {"too_late", "task_failed", "task_unfinished"}


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    """Leave no `default` answer, which would let every status pass: each that comes has to be described by itself."""
    for calls in raw_schema["paths"].values():
        for call in calls.values():
            call["responses"].pop("default", None)


@schemathesis.check
def no_server_error(ctx: Any, response: Any, case: Any) -> None:
    """Stands for schemathesis' own not_a_server_error, which knows of statuses alone."""
    if response.status_code >= 500 and _code(response.content) not in ASKED_FOR:
        raise AssertionError(f"{response.status_code}: {response.text[:300]}")


def _code(body: bytes) -> str | None:
    """Return an error's code, in whichever form its dialect has it."""
    try:
        told = json.loads(body)
    except ValueError:
        return None
    told = told.get("error", told) if isinstance(told, dict) else {}
    return told.get("code") if isinstance(told, dict) else None
