"""What operators do to the fleet on Redis: pause it, drain a worker, have one started anew, clear up what failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common import keys
from common.cards import slot_of
from common.failed import FailedTask, Place, Purged, purged
from common.link import Link
from common.records import queue_parts

FAILED = ("failed", "expired")  # states; RQ too counts both as failed
READ_AT_ONCE = 256
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
        self.undrain_slot(slot_of(worker))

    def undrain_slot(self, slot: str) -> None:
        """Let whoever is there, or comes there, claim again."""
        self._patiently(lambda: self._redis.srem(keys.DRAINED, slot))

    def drained(self) -> set[str]:
        """Return the slots that are drained, whether a worker is there or not."""
        found: set[str] = self._patiently(lambda: self._redis.smembers(keys.DRAINED))
        return found

    def restart(self, worker: str) -> None:
        """Have this very worker finish what it has and end, so that its supervisor starts another in its place."""
        self._patiently(lambda: self._redis.set(keys.RESTART + worker, 1, ex=RESTART_TTL_S))

    def failed(
        self, *, model: str | None = None, tenant: str | None = None, after: Place | None = None
    ) -> Iterator[FailedTask]:
        """Yield the tasks that RQ's registries have as failed, of one model or tenant, or behind a place, if that is
        given. Where that task is gone by now, its queue comes once more.
        """
        for queue in sorted(key.removeprefix(keys.RQ_QUEUE) for key in self._queues()):
            parts = queue_parts(queue)
            if after and queue < after.queue:
                continue
            if parts and model in (None, parts[0]) and tenant in (None, parts[2]):
                for task in self._failed_in(queue, after.task_id if after and queue == after.queue else None):
                    if not after or task.created_ms <= after.until_ms:
                        yield task

    def purge(self, tasks: Sequence[FailedTask]) -> list[Purged]:
        """Remove these tasks, if they are still failed; return what they may have left in storage."""
        reply = self._run("purge", *(part for task in tasks for part in (task.task_id, task.queue)))
        return [purged(row) for row in reply]

    def _queues(self) -> set[str]:
        found: set[str] = self._patiently(lambda: self._redis.smembers(keys.RQ_QUEUES))
        return found

    def _failed_in(self, queue: str, after: str | None) -> Iterator[FailedTask]:
        ids: list[str] = self._patiently(lambda: self._redis.zrange(keys.RQ_FAILED + queue, 0, -1))
        first = ids.index(after) + 1 if after in ids else 0
        for begin in range(first, len(ids), READ_AT_ONCE):
            for task_id, fields in self._read(ids[begin : begin + READ_AT_ONCE]):
                status, retried_as, key_id, created_at = fields
                if status is None or status in FAILED:
                    known, created_ms = status is not None, int(created_at or 0)
                    yield FailedTask(task_id, queue, key_id or "", created_ms, retried=bool(retried_as), known=known)

    def _read(self, ids: Sequence[str]) -> list[tuple[str, list[str | None]]]:
        def read() -> list[tuple[str, list[str | None]]]:
            pipeline = self._redis.pipeline(transaction=False)
            for task_id in ids:
                pipeline.hmget(keys.TASK + task_id, "status", "retried_as", "key", "created_at")
            return list(zip(ids, pipeline.execute(), strict=True))

        return self._patiently(read)
