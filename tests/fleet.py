"""A small fleet for tests: workers over a Redis, and what to ask about its tasks."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from common.broker import Broker
from common.cards import WorkerCard
from common.records import NewTask
from common.schemas import TaskRecord, TaskStatus
from tests.conftest import resolved
from tests.servers import eventually


def submit_many(broker: Broker, count: int, *, tenant: str = "default", **changes: object) -> list[str]:
    """Submit so many tasks and return their ids."""
    ids = [secrets.token_hex(16) for _ in range(count)]
    for task_id in ids:
        broker.submit(NewTask(task_id=task_id, tenant=tenant, request=resolved(**changes)))
    return ids


def record(broker: Broker, task_id: str) -> TaskRecord:
    found = broker.view(task_id)
    assert found is not None, f"task {task_id} is gone"
    return found


def ready_workers(broker: Broker, count: int = 1, within_s: float = 60.0) -> list[WorkerCard]:
    """Wait until so many workers have loaded their models; return their cards."""

    def ready() -> list[WorkerCard]:
        cards = [card for card in broker.workers() if card.state in ("idle", "busy")]
        return cards if len(cards) >= count else []

    eventually(ready, within_s=within_s)
    return ready()


def await_running(broker: Broker, task_ids: Iterable[str]) -> TaskRecord:
    """Wait until one of the tasks has begun to advance; return its record."""
    running: list[TaskRecord] = []

    def find() -> bool:
        records = [record(broker, task_id) for task_id in task_ids]
        running[:] = [task for task in records if task.status is TaskStatus.RUNNING and task.step]
        return bool(running)

    eventually(find, within_s=40)
    return running[0]


def await_final(broker: Broker, task_ids: Iterable[str], within_s: float = 60.0) -> list[TaskRecord]:
    """Wait until all the tasks are final; return their records."""
    ids = list(task_ids)
    eventually(lambda: all(record(broker, task_id).status.final for task_id in ids), within_s=within_s)
    return [record(broker, task_id) for task_id in ids]
