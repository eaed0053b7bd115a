"""One worker with enough to do: what share of the ideal it reaches and what a task costs it; stock RQ alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from bench import cpu, load, stock_rq
from bench.caller import Caller, Unexpected, body, in_turn
from bench.fleet import Fleet, Gateway

DONE_S = 120.0
POLL_S = 0.1


class Backlog(NamedTuple):
    """`share` of ideal throughput; processor milliseconds per task of the worker, beyond idling, and of Redis."""

    share: float
    cpu_ms: float
    redis_ms: float


def ours(
    fleet: Fleet, port: int, worker_pid: int, tasks: int, image_ms: float, idle: cpu.Spent, *, steps: int = 8
) -> Backlog:
    """Submit all tasks over HTTP, let one worker work them off."""

    def submit() -> list[str]:
        caller = Caller(port)
        try:
            return [caller.submit(steps=steps) for _ in range(tasks)]
        finally:
            caller.close()

    return _backlog(fleet, worker_pid, submit, lambda: fleet.broker.pending() == 0, image_ms, idle)


def stock(fleet: Fleet, worker_pid: int, tasks: int, image_ms: float, idle: cpu.Spent) -> Backlog:
    """Enqueue all jobs, let one SimpleWorker work them off."""
    jobs = stock_rq.queue(fleet)
    finished = f"rq:finished:{stock_rq.QUEUE}"
    done = int(fleet.redis.zcard(finished)) + tasks
    return _backlog(
        fleet, worker_pid, lambda: [stock_rq.enqueue(jobs, image_ms / 1000) for _ in range(tasks)],
        lambda: fleet.redis.zcard(finished) >= done, image_ms, idle,
    )  # fmt: skip


def _backlog(
    fleet: Fleet,
    pid: int,
    submit: Callable[[], list[str]],
    finished: Callable[[], bool],
    image_ms: float,
    idle: cpu.Spent,
) -> Backlog:
    ids: list[str] = []
    submitted = 0.0

    def run() -> None:
        nonlocal submitted
        ids.extend(submit())
        submitted = time.time()
        until = time.monotonic() + DONE_S
        while not finished():
            if time.monotonic() > until:
                raise TimeoutError("tasks do not finish")
            time.sleep(POLL_S)

    redis = cpu.cpu_s(fleet.redis_pid)
    spent = cpu.spent(pid, run)
    redis = cpu.cpu_s(fleet.redis_pid) - redis
    # RQ and zfleet both write ended_at into RQ's job hash, so one reader serves both
    ended = sorted(_seconds(fleet.redis.hget(f"rq:job:{task_id}", "ended_at")) for task_id in ids)
    steady = [moment for moment in ended if moment > submitted]  # with the rest enqueued beforehand
    share = (len(steady) - 1) * image_ms / 1000 / (steady[-1] - steady[0])
    return Backlog(share, spent.per_task_ms(len(ids), idle), redis / len(ids) * 1000)


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


class Costs(NamedTuple):
    """A server's processor milliseconds per task, at so many tasks a second."""

    cpu_ms: float
    per_s: float


def at_leisure(gateway: Gateway, tasks: int, callers: int, idle: cpu.Spent) -> Costs:
    """Have a few callers submit and wait by one status call each; return what that costs the gateway."""
    spent = cpu.spent(gateway.pid, lambda: in_turn(gateway.port, tasks, callers))
    return Costs(spent.per_task_ms(tasks, idle), tasks / spent.wall_s)


def busy(server: Gateway, what: load.What, seconds: float, connections: int) -> Costs:
    """Have the generator do so, or only submit, on many connections at once; return what that costs the server."""
    runs: list[load.Load] = []
    spent = cpu.spent(
        server.pid,
        lambda: runs.append(load.send(server.port, what, body(), seconds=seconds, connections=connections)),
    )
    run = runs[0]
    if run.unexpected:
        raise Unexpected(f"{run.unexpected} of {run.done} {what} went wrong")
    return Costs(spent.cpu_s / run.done * 1000, run.per_s)
