"""Breaks a fleet on purpose, so that the tests can show that the audit sees it. Python imports this at its start.

Only where a test puts this folder on PYTHONPATH and names what to break in ZFLEET_TEST_SABOTAGE, comma-separated.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any


def unfenced() -> None:
    """Let any worker end any run: `finish` looks at neither fence, worker nor state, no run is told that it is lost,
    and no worker drops a run of its own accord.
    """
    from common import broker, link
    from worker import engine

    source, _ = link.SCRIPTS["finish"]
    checks = "local now = now_ms()\nif ARGV[13] == 'again'"
    if checks not in source:
        raise SystemExit("finish.lua has changed: its checks are not where they are fooled")
    bare = source.replace(checks, "r[1], r[2], r[5] = 'running', fence, ARGV[10]\n" + checks)
    link.SCRIPTS["finish"] = (bare, hashlib.sha1(bare.encode(), usedforsecurity=False).hexdigest())
    honest_engine = engine.Engine.__init__

    def trusting(self: engine.Engine, **options: Any) -> None:
        honest_engine(self, **options | {"fence_after_s": math.inf})

    engine.Engine.__init__ = trusting  # type: ignore[method-assign]
    honest_beat, honest_progress = broker.Broker.beat, broker.Broker.progress

    def beat(*args: Any) -> Any:
        told = honest_beat(*args)
        return told._replace(verdicts=["ok"] * len(told.verdicts))

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
