"""The fleet as it stands: what waits and runs, its workers by state, its disks and its Redis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import get_args

from prometheus_client.core import Metric

from common.cards import WorkerState
from common.schemas import PRIORITIES
from gateway.metrics.look import Look, gauge

LINE = ["model", "priority"]


def queues(look: Look) -> Iterator[Metric]:
    """Yield what waits and what runs, summed over tenants."""
    waiting = Counter[tuple[str, str]](dict.fromkeys(product(look.models, PRIORITIES), 0))
    running = Counter[str](dict.fromkeys(look.models, 0))
    oldest = dict.fromkeys(waiting, 0.0)
    for queue in look.queues:
        line = queue.model, queue.priority
        waiting[line] += queue.queued
        running[queue.model] += queue.running
        oldest[line] = max(oldest.get(line, 0.0), queue.oldest_age_seconds or 0.0)
    yield from gauge("zfleet_queue_tasks", "Tasks that wait for a worker.", LINE, sorted(waiting.items()))
    about = "How long the oldest task in line has been there; 0 without any."
    yield from gauge("zfleet_queue_oldest_age_seconds", about, LINE, sorted(oldest.items()))
    rows = [([model], tasks) for model, tasks in sorted(running.items())]
    yield from gauge("zfleet_running_tasks", "Tasks that workers hold.", ["model"], rows)


def workers(look: Look) -> Iterator[Metric]:
    """Yield the live workers by state, and whether they are paused."""
    states = Counter(card.state for card in look.cards)
    rows = [([state], states[state]) for state in get_args(WorkerState)]
    yield from gauge("zfleet_workers", "Live workers by state; lost: a GPU that is gone.", ["state"], rows)
    yield from gauge("zfleet_suspended", "1 while an operator has paused the fleet.", [], [([], float(look.suspended))])


def room(look: Look) -> Iterator[Metric]:
    """Yield the room that there is for results and in Redis."""
    disks = sorted(look.disks.items())
    about = "The disk that results are kept on: bytes that are free to others than root."
    yield from gauge("zfleet_disk_free_bytes", about, ["host"], [([host], disk.free) for host, disk in disks])
    about = "The disk that results are kept on: bytes used, and free to others than root."
    yield from gauge("zfleet_disk_size_bytes", about, ["host"], [([host], disk.size) for host, disk in disks])
    about = "Memory that Redis uses for data."
    yield from gauge("zfleet_redis_memory_used_bytes", about, [], [([], look.memory_bytes)])


SOURCES = (queues, workers, room)
