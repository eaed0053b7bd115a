"""Redis commands per task, counted by MONITOR: what clients send, and what scripts do with it inside Redis."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from bench import stock_rq
from bench.caller import Caller
from bench.fleet import Fleet
from common.link import SCRIPTS

NAMES = {sha: name for name, (_, sha) in SCRIPTS.items()}
ASIDE = frozenset({"progress"})
# By the clock, however many tasks there are
BACKGROUND = frozenset({"beat", "reap", "reconcile", "sample", "note_disk", "add_counts", "PING"})


AFTER_S = 0.05  # a worker tidies up for a moment after a task has finished


class Commands(NamedTuple):
    """Commands per task: `wire` as clients send them, `total` with those inside scripts; `by_name` what is in `wire`.

    Progress reports and what happens by the clock (beats, reaping) are in `aside` only.
    """

    wire: float
    total: float
    by_name: dict[str, float]
    aside: dict[str, float]


def ours(fleet: Fleet, port: int, tasks: int, key: str = "") -> Commands:
    """Submit one task after the other to an idle worker, over HTTP, and wait for each: the dearest way there is."""
    caller = Caller(port, key)

    def run() -> None:
        for _ in range(tasks):
            caller.finished(caller.submit())
        time.sleep(AFTER_S)

    caller.finished(caller.submit())  # scripts are loaded, connections made
    try:
        return _count(fleet, run, tasks)
    finally:
        caller.close()


def stock(fleet: Fleet, tasks: int, seconds: float) -> Commands:
    """Enqueue one job after the other for an idle SimpleWorker and let it work them off."""
    jobs = stock_rq.queue(fleet)

    def one() -> None:
        job_id = stock_rq.enqueue(jobs, seconds)
        _await(lambda: fleet.redis.zscore(f"rq:finished:{stock_rq.QUEUE}", job_id) is not None)
        time.sleep(AFTER_S)

    def run() -> None:
        for _ in range(tasks):
            one()

    one()
    return _count(fleet, run, tasks)


def _await(check: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not check():
        if time.monotonic() > until:
            raise TimeoutError("tasks do not finish")
        time.sleep(0.02)


def _count(fleet: Fleet, run: Callable[[], object], tasks: int) -> Commands:
    with monitored(fleet.redis) as heard:
        run()
    wire: Counter[str] = Counter()
    total: Counter[str] = Counter()
    name = ""
    for source, command in heard:
        if source != "lua":
            word, _, rest = command.partition(" ")
            name = NAMES.get(rest.split(" ", 1)[0], word) if word.upper() in ("EVALSHA", "EVAL") else word.upper()
            wire[name] += 1
        total[name] += 1
    counted = {name: count / tasks for name, count in wire.items() if name not in ASIDE | BACKGROUND}
    aside = {name: count / tasks for name, count in wire.items() if name in ASIDE | BACKGROUND}
    inside = sum(count for name, count in total.items() if name not in ASIDE | BACKGROUND) / tasks
    return Commands(sum(counted.values()), inside, counted, aside)


@contextmanager
def monitored(client: Any) -> Iterator[list[tuple[str, str]]]:
    """Yield a list that fills with (source, command) of what Redis is asked by others; complete after the block."""
    end = secrets.token_hex(8)
    mine = client.client_info()["addr"]
    heard: list[tuple[str, str]] = []
    listening = threading.Event()

    def listen() -> None:
        with client.monitor() as monitor:
            listening.set()
            for entry in monitor.listen():
                if end in entry["command"]:
                    return
                if f"{entry['client_address']}:{entry['client_port']}" != mine:
                    heard.append((entry["client_type"], entry["command"]))

    thread = threading.Thread(target=listen)
    thread.start()
    listening.wait()
    try:
        yield heard
    finally:
        client.echo(end)
        thread.join()
