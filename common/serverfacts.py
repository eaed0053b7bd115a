"""What Redis says of itself: whether it takes writes, keeps what it is told, and is set up as a fleet needs it."""

from __future__ import annotations

import secrets
import time
from typing import Any

from common import keys
from common.connection import allowed
from common.link import Link
from common.redisstate import RedisFacts, RedisState, redis_state


class ServerFacts(Link):
    """The part of the broker that asks about Redis itself. Raises RedisUnavailable."""

    def redis_facts(self) -> RedisFacts:
        """Return how Redis is set up."""
        return self._patiently(self._facts)

    def redis_state(self) -> RedisState:
        """Return how well Redis keeps what it is told."""

        def read() -> RedisState:
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.info("persistence")
            pipeline.info("replication")
            return redis_state(*pipeline.execute())

        return self._patiently(read)

    def probe(self) -> None:
        """Write to Redis, which raises RedisUnavailable where it takes no writes."""
        self._patiently(self._write)

    def takes_writes(self) -> bool:
        """Do the same, and return False where this user has no key for that."""
        return self._patiently(lambda: allowed(self._write) is not None)

    def _write(self) -> object:
        return self._redis.set(keys.PROBE, secrets.token_hex(4), ex=keys.PROBE_TTL_S)

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
            primary=f"{info['master_host']}:{info['master_port']}" if info.get("role") == "slave" else "",
            clock_ahead_s=seconds + micros / 1e6 - (before + after) / 2,
        )
