"""Redis: there, new enough, keeping what it is told, throwing nothing away, with a user of its own, and its clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit

from common.broker import Broker
from common.errors import ConfigurationError, RedisUnavailable
from common.listening import is_loopback
from common.redisstate import RedisFacts
from common.settings import Settings, mask_url
from zfleet.doctor.report import Finding, Patient, State

OLDEST = (6, 2)
CLOCK_WARNING_S = 1.0
CLOCK_PROBLEM_S = 10.0
NEARLY_FULL = 0.9  # of maxmemory


def check(patient: Patient) -> Iterator[Finding]:
    """Look at the Redis of ZFLEET_REDIS_URL."""
    settings = patient.settings
    url = mask_url(settings.redis_url)
    try:
        with contextlib.closing(Broker(settings)) as broker:
            facts = broker.redis_facts()
            yield _replica(facts, url) if facts.primary else _writes(broker, url)
    except (ConfigurationError, RedisUnavailable) as error:
        yield Finding("redis", "problem", f"{url}: {error.message}", "start it, or correct ZFLEET_REDIS_URL")
        return
    yield from judge(facts)
    yield user(facts, settings)
    yield clock("redis clock", facts.clock_ahead_s)


def judge(facts: RedisFacts) -> Iterator[Finding]:
    """Judge the server's version and how it keeps what it is told."""
    numbers = tuple(int(part) for part in facts.version.split(".")[:2])
    if numbers < OLDEST:
        yield Finding("redis version", "problem", facts.version, "install Redis 6.2 or later")
    else:
        yield Finding("redis version", "ok", facts.version)
    yield _persistence(facts)
    yield _memory(facts)


def user(facts: RedisFacts, settings: Settings) -> Finding:
    """Judge which user this process is on Redis."""
    parts = urlsplit(settings.redis_url)
    name = facts.user or parts.username or "default"
    if name != "default":
        unsure = "" if facts.user else " (as the URL has it: ACL WHOAMI is refused to it, as it should be)"
        return Finding("redis user", "ok", f"{name}{unsure}")
    near = (
        settings.redis_url.startswith("unix://") or parts.hostname == "localhost" or is_loopback(parts.hostname or "")
    )
    if near:
        return Finding("redis user", "ok", "default, on this machine alone")
    remedy = "give each part of the fleet a user of its own: deploy/redis/README.md"
    if parts.password:
        return Finding("redis user", "warning", "default, which may do anything", remedy)
    return Finding("redis user", "problem", "default without a password, over the network", remedy)


def clock(check: str, ahead_s: float) -> Finding:
    """Judge how far another clock is ahead of this machine's."""
    off = abs(ahead_s)
    says = f"{off:.1f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's"
    if off <= CLOCK_WARNING_S:
        return Finding(check, "ok", "agrees with this machine's")
    remedy = "let both keep time by NTP (chrony, systemd-timesyncd)"
    return Finding(check, "problem" if off > CLOCK_PROBLEM_S else "warning", says, remedy)


def _persistence(facts: RedisFacts) -> Finding:
    if not facts.aof:
        remedy = "appendonly yes in redis.conf, and redis-cli config set appendonly yes"
        return Finding("redis AOF", "problem", "is off: a restart forgets accepted tasks", remedy)
    if facts.write_error:
        says = f"the last write failed ({facts.write_error})"
        return Finding("redis AOF", "problem", says, "see the disk of Redis, and its log")
    if facts.appendfsync == "no":
        says = "on, but appendfsync is no: a power cut may lose half a minute"
        return Finding("redis AOF", "warning", says, "appendfsync everysec")
    told = facts.appendfsync or "unknown: this user may not ask (CONFIG GET), as it should be"
    return Finding("redis AOF", "ok", f"on, appendfsync {told}")


def _memory(facts: RedisFacts) -> Finding:
    limit = f"maxmemory {facts.maxmemory >> 20} MiB" if facts.maxmemory else "no maxmemory"
    says = f"{limit}, {facts.used >> 20} MiB used, {facts.policy}"
    if facts.policy != "noeviction":
        state: State = "problem" if facts.maxmemory else "warning"
        return Finding(
            "redis memory", state, f"{says}: full, it throws accepted tasks away", "maxmemory-policy noeviction"
        )
    if facts.maxmemory and facts.used > facts.maxmemory * NEARLY_FULL:
        return Finding("redis memory", "warning", says, "raise maxmemory: once it is full, submits are refused")
    return Finding("redis memory", "ok", says)


def _replica(facts: RedisFacts, url: str) -> Finding:
    says = f"{url} is a replica of {facts.primary}, and takes no writes"
    return Finding("redis", "problem", says, "name the primary in ZFLEET_REDIS_URL, or Sentinels, which know it")


def _writes(broker: Broker, url: str) -> Finding:
    try:
        tried = broker.takes_writes()
    except RedisUnavailable as error:
        return Finding("redis", "problem", f"{url}: {error.message}", "see its disk and its memory")
    return Finding("redis", "ok", f"{url} answers, {'and takes writes' if tried else 'this user may try no write'}")
