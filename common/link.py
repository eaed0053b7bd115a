"""A process's way to Redis, which every part of the broker shares: connections, scripts, patience, promises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from common import keys, scripts
from common.connection import FOREVER, connect, exchange, patiently, run_script
from common.promises import Promises
from common.settings import Settings

T = TypeVar("T")

BELL_WAIT_S = 1.0  # an idle worker looks up this often; the bell has a longer socket time-out of its own
BELL_POOL_SIZE = 2  # connections that block: the wait for the bell, or one subscription to ends and one to everything
SCRIPTS = scripts.load(keys.lua_table())


class Link:
    """The connections of one process. Safe to share between threads and greenlets.

    All calls raise RedisUnavailable when Redis stays away longer than the patience.
    """

    def __init__(
        self, settings: Settings, *, patience_s: float | None = None, void: Callable[[str, int], None] | None = None
    ) -> None:
        """Connects lazily. `patience_s` is how long a call tries before RedisUnavailable; one that is given `give_up`
        tries for as long as that does not say so. `void` is told of results that are void after all: see Promises.
        """
        self._settings = settings
        self._patience_s = settings.redis_patience_s if patience_s is None else patience_s
        self._timeout_s = settings.redis_timeout_s
        self._promises = Promises(SCRIPTS, void)
        url, heard, bell_s = settings.redis_url, self._promises.connected, BELL_WAIT_S + self._timeout_s
        # Any: redis-py types every reply as possibly bytes or awaitable, which these clients never give
        self._redis: Any = connect(url, timeout_s=self._timeout_s, connected=heard)
        self._bell: Any = connect(url, timeout_s=bell_s, pool_size=BELL_POOL_SIZE, connected=heard)
        self._retention_ms = int(settings.retention_days * 86_400_000)

    def clock_ms(self) -> int:
        """Return the milliseconds since 1970 by Redis' clock, which all that is kept there is dated by."""
        seconds, micros = self._patiently(self._redis.time)
        return int(seconds) * 1000 + int(micros) // 1000

    def close(self) -> None:
        """Close all connections."""
        self._redis.close()
        self._bell.close()

    def _run(
        self,
        script: str,
        *args: str | float,
        give_up: Callable[[], bool] | None = None,
    ) -> Any:
        reply, history = self._patiently(lambda: run_script(self._redis, SCRIPTS[script], args), give_up)
        self._promises.heed(script, args, reply, history)
        return reply

    def _patiently(self, call: Callable[[], T], give_up: Callable[[], bool] | None = None) -> T:
        def attempt() -> T:
            self._promises.renew(partial(exchange, self._redis))
            return call()

        patience_s = FOREVER if give_up else self._patience_s
        answer = patiently(
            attempt, patience_s=patience_s, timeout_s=self._timeout_s, give_up=give_up or (lambda: False)
        )
        self._promises.answered()
        return answer
