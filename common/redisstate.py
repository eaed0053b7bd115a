"""What Redis tells of itself: whether its file and its replicas keep what it is told, and how it is set up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_REPLICA = re.compile(r"slave\d+")


class Replica(NamedTuple):
    """A replica as its primary sees it: whether it has a copy and follows, how long it has been silent (it speaks once
    a second), and how many bytes of the primary's stream it has not confirmed.
    """

    online: bool
    silent_s: float
    behind_bytes: int


class RedisState(NamedTuple):
    """How well a primary keeps its data. Without an append-only file its writes count as fine."""

    aof_written: bool
    aof_rewritten: bool
    replicas: tuple[Replica, ...]


class RedisFacts(NamedTuple):
    """How Redis is set up. None is what the user may not ask, or an old server does not tell."""

    version: str
    aof: bool
    appendfsync: str | None
    write_error: str  # of the last write of the AOF or of a snapshot; empty: none
    maxmemory: int  # bytes; 0: no limit
    used: int  # bytes
    policy: str
    user: str | None
    primary: str  # where the one is that this server copies; empty: it is none's replica
    clock_ahead_s: float  # of this machine's, give or take half a round trip


def redis_state(persistence: Mapping[str, Any], replication: Mapping[str, Any]) -> RedisState:
    """Read these two sections of INFO, as redis-py hands them out; what a server does not tell counts as fine."""
    end = int(replication.get("master_repl_offset", 0))
    told = [fields for name, fields in replication.items() if _REPLICA.fullmatch(name) and isinstance(fields, dict)]
    return RedisState(
        aof_written=persistence.get("aof_last_write_status", "ok") == "ok",
        aof_rewritten=persistence.get("aof_last_bgrewrite_status", "ok") == "ok",
        replicas=tuple(
            Replica(
                online=fields.get("state") == "online",
                silent_s=float(fields.get("lag", 0)),
                behind_bytes=max(0, end - int(fields.get("offset", end))),
            )
            for fields in told
        ),
    )
