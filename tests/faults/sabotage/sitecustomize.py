"""Breaks a fleet on purpose, so that the tests can show that the audit sees it. Python imports this at its start.

Only where a test puts this folder on PYTHONPATH and names what to break in ZFLEET_TEST_SABOTAGE, comma-separated.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any


def unfenced() -> None:
    """Let any worker end any run: `finish` looks at neither fence, worker nor state, and no run is told it is lost."""
    from common import broker

    source, _ = broker.SCRIPTS["finish"]
    read, checks, rest = source.partition("if r[2] ~= fence")
    _, now, write = rest.partition("local now = now_ms()\nredis.call('HSET'")
    if not checks or not now:
        raise RuntimeError("finish.lua has changed: its checks are not where they are taken out")
    bare = read + now + write
    broker.SCRIPTS["finish"] = (bare, hashlib.sha1(bare.encode(), usedforsecurity=False).hexdigest())
    honest_beat, honest_progress = broker.Broker.beat, broker.Broker.progress

    def beat(*args: Any) -> Any:
        registered, verdicts = honest_beat(*args)
        return registered, ["ok"] * len(verdicts)

    def progress(*args: Any) -> Any:
        return ["ok"] * len(honest_progress(*args))

    broker.Broker.beat = beat  # type: ignore[method-assign]
    broker.Broker.progress = progress  # type: ignore[method-assign]


def unreconciled() -> None:
    """Let no supervisor look for tasks that stand nowhere."""
    from common import broker

    broker.Broker.reconcile = lambda _self, _every_s=0.0: []  # type: ignore[method-assign]


for name in filter(None, os.environ.get("ZFLEET_TEST_SABOTAGE", "").split(",")):
    {"unfenced": unfenced, "unreconciled": unreconciled}[name]()
