"""A whole fleet under steady load for as long as you like: nothing grows, nothing slows down, and the books balance.

`python -m tests.faults.soak --minutes 10 --model simulated`, or `make soak SOAK_MINUTES=10`. Every two seconds it takes
the memory (RSS), open files and threads of every process of the fleet, the number of keys on Redis, and the latency of
the tasks that ended. The first fifth is warm-up. Then no figure may drift; trend.py says what that means. Exit code 1
for a drift, for a process that was replaced, and for books that do not balance.

Records are kept for so short a time that their number levels off within the warm-up. Idempotency keys are kept for a
day by contract, so they grow with the tasks and are not counted.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from common import keys
from tests.faults.books import Mix
from tests.faults.rig import Rig, tree
from tests.faults.trend import Trend, trend

SAMPLE_S = 2.0
SHARE = 0.7  # of what the fleet can do
WARM_UP = 0.2  # of the run
RETENTION = 0.08  # of the run; a record lives twice as long, which is less than the warm-up
SHORTEST_RETENTION_S = 6.0  # clients still have to see the end of their tasks
PROGRESS_EVERY = 15  # samples
WORKERS = 2
MIXES = {
    "simulated": (Mix(), 5.0),  # what is asked for, and for how many seconds the fleet's capacity is measured
    "pico": (Mix(model="pico", sides=(64, 96, 128), steps=(4, 8), pictures=(1,)), 30.0),
}
MIB = 2.0**20


class Figure(NamedTuple):
    """Something that is sampled, of a process or of the fleet."""

    subject: str
    name: str

    def tolerance(self, level: float) -> float:
        """Return by how much this figure may grow over a run that is not short."""
        return {"RSS MiB": max(4.0, 0.05 * level), "files": 3.0, "threads": 1.0, "keys": max(20.0, 0.05 * level),
                "latency ms": max(50.0, 0.2 * level)}[self.name]  # fmt: skip


class Series:
    """The samples of every figure. `replaced` names the processes that are not those of the beginning."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._processes = dict(processes(rig))
        self._told: set[str] = set()
        self.samples: dict[Figure, list[tuple[float, float]]] = defaultdict(list)
        self.replaced: set[str] = set()

    def take(self) -> None:
        """Take one sample of everything, now."""
        now = time.monotonic()
        for subject, process in self._processes.items():
            try:
                with process.oneshot():
                    figures = {"RSS MiB": process.memory_info().rss / MIB, "files": process.num_fds(),
                               "threads": process.num_threads()}  # fmt: skip
            except psutil.NoSuchProcess:
                self.replaced.add(subject)
                continue
            for name, value in figures.items():
                self.samples[Figure(subject, name)].append((now, value))
        counted = sum(not key.startswith(keys.IDEMPOTENCY) for key in self._rig.redis.client.scan_iter(count=1000))
        self.samples[Figure("Redis", "keys")].append((now, counted))
        if latencies := self._latencies():
            self.samples[Figure("tasks", "latency ms")].append((now, statistics.median(latencies)))

    def trends(self) -> dict[Figure, Trend]:
        """Return the trend of every figure over what has been sampled."""
        found = {}
        for figure, samples in self.samples.items():
            times, values = zip(*samples, strict=True)
            found[figure] = trend(times, values, figure.tolerance(statistics.median(values)))
        return found

    def _latencies(self) -> list[float]:
        ended = {
            task_id: final for task_id, final in list(self._rig.ledger.finals.items()) if task_id not in self._told
        }
        self._told |= set(ended)
        return [final.total_ms for final in ended.values() if final.total_ms is not None]


def processes(rig: Rig) -> Iterator[tuple[str, psutil.Process]]:
    """Yield every process of the fleet under a name that tells its part."""
    yield "Redis server", psutil.Process(rig.redis.pid)
    for role, child, server in (("gateway", "gunicorn", rig.gateway), ("worker", "supervisor", rig.supervisors[0])):
        parent, *children = tree(server)
        yield child, parent
        for number, process in enumerate(children):
            yield f"{role} {number}", process


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="soak", description="A fleet under steady load: nothing may grow.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", choices=sorted(MIXES), default="simulated")
    options = parser.parse_args(argv)
    if argv is None:  # as a program: SIGTERM ends the fleet as well, as Ctrl-C does
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    whole_s = options.minutes * 60
    mix, measure_s = MIXES[options.model]
    retention_s = max(SHORTEST_RETENTION_S, RETENTION * whole_s)
    with (
        tempfile.TemporaryDirectory(prefix="zfleet-soak-") as folder,
        Rig(
            Path(folder), models=(options.model,), retention_days=retention_s / 86_400, lease_s=15.0, beat_s=3.0
        ) as rig,
    ):
        rig.supervise(workers_per_device=WORKERS)
        rate_s = SHARE * capacity(rig, mix, min(measure_s, whole_s / 4))
        print(f"{options.model}: {rate_s:.2f} tasks a second, {SHARE:.0%} of what {WORKERS} workers can do", flush=True)
        with rig.load(rate_s=rate_s, mix=mix) as load:
            series = soak(rig, whole_s)
        report = rig.close_books(load)
        print(table(series.trends()))
        print(f"\nbooks: {report}")
        drifting = [figure for figure, found in series.trends().items() if found.drifts]
    for figure in drifting:
        print(f"drift: {figure.name} of {figure.subject}")
    for subject in series.replaced:
        print(f"replaced: {subject}")
    return int(bool(drifting or series.replaced or not report.balanced))


def capacity(rig: Rig, mix: Mix, seconds: float) -> float:
    """Return how many tasks of this mix the fleet ends in a second, measured with its queue never empty."""
    before, began = len(rig.ledger.finals), time.monotonic()
    with rig.load(rate_s=50, clients=2, backlog=4 * WORKERS, mix=mix) as load:
        time.sleep(seconds)
    done = len(rig.ledger.finals) - before
    rate_s = done / (time.monotonic() - began)
    assert load.drain() and done, "the fleet ended nothing while its capacity was measured"
    return rate_s


def soak(rig: Rig, whole_s: float) -> Series:
    """Sample for so long under a load that runs; what is sampled in the warm-up is thrown away."""
    time.sleep(whole_s * WARM_UP)
    series, began = Series(rig), time.monotonic()
    while (elapsed_s := time.monotonic() - began) < whole_s * (1 - WARM_UP):
        series.take()
        latency = series.samples[Figure("tasks", "latency ms")]
        if latency and len(latency) % PROGRESS_EVERY == 0:
            rss = sum(samples[-1][1] for figure, samples in series.samples.items() if figure.name == "RSS MiB")
            ended, done_s = len(rig.ledger.finals), whole_s * WARM_UP + elapsed_s
            print(f"{done_s:.0f} of {whole_s:.0f} s: {ended} tasks, {latency[-1][1]:.0f} ms, {rss:.0f} MiB", flush=True)
        time.sleep(max(0.0, SAMPLE_S - (time.monotonic() - began) % SAMPLE_S))
    return series


def table(trends: dict[Figure, Trend]) -> str:
    """Return the figures as a Markdown table."""
    rows = [
        ("of", "figure", "level", "growth", "95 % interval", "tolerance", "drifts"),
        ("---",) * 2 + ("---:",) * 4 + ("---",),
    ]
    for figure, found in trends.items():
        interval = f"{found.low:+.2f} … {found.high:+.2f}"
        verdict = "**yes**" if found.drifts else "no"
        rows.append(
            (*figure, f"{found.level:.1f}", f"{found.growth:+.2f}", interval, f"{found.tolerance:.1f}", verdict)
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
