"""How often a key may submit: GCRA over Redis, by throttled-py, with one script and one round trip for each count.

Redis' clock is the only one, so all gateways count alike. docs/adr/0014 says why this library.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

from throttled import Quota, RedisStore, RedisStoreBackend, per_day, per_hour, per_min, per_sec
from throttled.rate_limiter.gcra import GCRARateLimiter

from common import keys
from common.apikeys import Rate
from common.link import Link
from common.records import Tally

PERIODS: dict[str, Callable[[int], Quota]] = {"s": per_sec, "m": per_min, "h": per_hour, "d": per_day}


class RateLimits(Link):
    """The part of the broker that counts. Raises RedisUnavailable."""

    def count(self, key_id: str, rate: Rate) -> Tally:
        """Count one submit of this key, unless that is one too many. One whose answer got lost is counted again."""
        result = self._patiently(lambda: self._limiter(rate).limit(key_id))
        state = result.state
        return Tally(result.limited, state.limit, state.remaining, state.reset_after, state.retry_after)

    @cached_property
    def _limiter(self) -> Callable[[Rate], GCRARateLimiter]:
        store = _Store(self._redis)
        return cache(lambda rate: GCRARateLimiter(_quota(rate), store, key_prefix=keys.RATES))


class _Backend(RedisStoreBackend):
    """throttled-py over the connections that are there, which know of Sentinel, TLS, time-outs and promises."""

    base_exceptions = ()  # errors come through as they are, for `_patiently` to tell which will pass

    def __init__(self, client: Any) -> None:
        super().__init__()
        self._client = client


class _Store(RedisStore):
    def __init__(self, client: Any) -> None:
        super().__init__()
        self._backend = _Backend(client)


def _quota(rate: Rate) -> Quota:
    count, _, unit = rate.partition("/")
    return PERIODS[unit](int(count))
