"""What Redis says of itself, for whoever checks that it is set up as a fleet needs it."""

from __future__ import annotations

import secrets
import time
from typing import Any

from common import keys
from common.connection import allowed
from common.link import Link
from common.redisstate import RedisFacts


class ServerFacts(Link):
    """The part of the broker that asks about Redis itself. Raises RedisUnavailable."""

    def redis_facts(self) -> RedisFacts:
        """Return how Redis is set up."""
        return self._patiently(self._facts)

    def takes_writes(self) -> bool:
        """Write to Redis; False where this user has no key for that. Raises RedisUnavailable if it takes none."""

        def write() -> object:
            return self._redis.set(keys.PROBE, secrets.token_hex(4), ex=keys.PROBE_TTL_S)

        return self._patiently(lambda: allowed(write) is not None)

    def _facts(self) -> RedisFacts:
        before = time.time()
        seconds, micros = self._redis.time()
        after = time.time()
        info: dict[str, Any] = self._redis.info()
        failed = [name for name in ("aof_last_write_status", "rdb_last_bgsave_status") if info.get(name, "ok") != "ok"]
        return RedisFacts(
            version=str(info["redis_version"]),
            aof=bool(info["aof_enabled"]),
            appendfsync=allowed(lambda: str(self._redis.config_get("appendfsync")["appendfsync"])),
            write_error=", ".join(failed),
            maxmemory=int(info["maxmemory"]),
            used=int(info["used_memory"]),
            policy=str(info["maxmemory_policy"]),
            user=allowed(lambda: str(self._redis.acl_whoami())),
            clock_ahead_s=seconds + micros / 1e6 - (before + after) / 2,
        )
