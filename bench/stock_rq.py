"""Stock RQ, measured as zfleet is: a SimpleWorker, the JSON serializer, jobs that sleep. `-m bench.stock_rq URL`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import redis
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer

from bench.fleet import Fleet

QUEUE = "stock"
START_S = 30.0


def nap(seconds: float) -> None:
    """The job: what a picture costs, and nothing else."""
    time.sleep(seconds)


@contextlib.contextmanager
def worker(fleet: Fleet) -> Iterator[int]:
    """Run a SimpleWorker on the fleet's Redis; yields its process id once it waits for jobs."""
    command = [sys.executable, "-m", "bench.stock_rq", fleet.settings.redis_url]
    with fleet.process("stock-rq", command) as child:
        until = time.monotonic() + START_S
        while not fleet.redis.scard(f"rq:workers:{QUEUE}") and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.5)  # it registers a moment before it asks for jobs
        yield child.pid


def queue(fleet: Fleet) -> Queue:
    """Return the queue to enqueue to; RQ needs a connection that does not decode."""
    connection: Any = redis.Redis.from_url(fleet.settings.redis_url)
    return Queue(QUEUE, connection=connection, serializer=JSONSerializer)


def enqueue(jobs: Queue, seconds: float) -> str:
    """Enqueue one nap; returns the job's id."""
    return str(jobs.enqueue("bench.stock_rq.nap", seconds).id)


def main(url: str) -> None:
    """Work until SIGTERM."""
    connection: Any = redis.Redis.from_url(url)
    stock = SimpleWorker(
        [Queue(QUEUE, connection=connection, serializer=JSONSerializer)],
        connection=connection, serializer=JSONSerializer,
    )  # fmt: skip
    stock.work(logging_level="WARNING")


if __name__ == "__main__":
    main(*sys.argv[1:])
