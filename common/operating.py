"""What operators do to the fleet on Redis: pause it, drain a worker, have one started anew."""

from __future__ import annotations

from common import keys
from common.cards import slot_of
from common.link import Link

RESTART_TTL_S = 60  # by then a worker that lives has beaten, and been told


class Operating(Link):
    """The part of the broker that operators steer by. All methods raise RedisUnavailable."""

    def suspend(self) -> None:
        """Have no task claimed any more, as `rq suspend` does; submits are still accepted."""
        self._patiently(lambda: self._redis.set(keys.RQ_SUSPENDED, 1))

    def resume(self) -> None:
        """Let tasks be claimed again, as `rq resume` does."""
        self._patiently(lambda: self._redis.delete(keys.RQ_SUSPENDED))

    def suspended(self) -> bool:
        """Return whether an operator has paused the fleet, here or by RQ's tools."""
        return self._patiently(lambda: bool(self._redis.exists(keys.RQ_SUSPENDED)))

    def drain(self, worker: str) -> None:
        """Have the worker claim nothing more, and whoever follows it in its slot, until `undrain`."""
        self._patiently(lambda: self._redis.sadd(keys.DRAINED, slot_of(worker)))

    def undrain(self, worker: str) -> None:
        """Let the workers of this one's slot claim again."""
        self._patiently(lambda: self._redis.srem(keys.DRAINED, slot_of(worker)))

    def restart(self, worker: str) -> None:
        """Have this very worker finish what it has and end, so that its supervisor starts another in its place."""
        self._patiently(lambda: self._redis.set(keys.RESTART + worker, 1, ex=RESTART_TTL_S))
