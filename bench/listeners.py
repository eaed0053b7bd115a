"""What thousands of clients who follow tasks, and thousands of polls a second, do to a gateway and to others' submits.

`python -m bench.listeners` takes two and a half minutes, `--quick` a dozen seconds with less to rely on. Prints a
Markdown table and writes bench/results/listeners-<time>.json. How each figure is measured: bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rq import suspension

from bench.caller import Caller
from bench.cpu import cpu_s, waited_s
from bench.fleet import ROOT, Fleet, Gateway
from bench.report import Row, machine, save, table
from zfleet.interrupts import Interrupts

RENEW_S = 2.0  # in the scene of few tasks another one comes so often
STEPS = 24


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    listeners: int = 2000
    pollers: int = 200
    polls_per_s: int = 2000
    submits_per_s: int = 25
    seconds: float = 20.0
    idle_s: float = 12.0
    spread: int = 400  # tasks
    few: int = 2


QUICK = Plan(listeners=60, pollers=20, polls_per_s=100, submits_per_s=20, seconds=1.5, idle_s=0.5, spread=20, few=2)


class Scene(NamedTuple):
    """What the crowd does."""

    name: str
    few: bool  # whether all look at the same few tasks, each of which takes long
    tagged: bool  # whether they send If-None-Match
    image_ms: float


SCENES = (
    Scene("many tasks, polls with If-None-Match", few=False, tagged=True, image_ms=800.0),
    Scene("few tasks at a time, polls with If-None-Match", few=True, tagged=True, image_ms=6000.0),
    Scene("many tasks, polls without", few=False, tagged=False, image_ms=800.0),
)


class Found(NamedTuple):
    """What a scene showed, and the submits just before it, when nobody else called."""

    scene: Scene
    idle: list[float]
    busy: list[float]
    seen: dict[str, Any]
    cpu: float  # cores busy
    lack: float  # cores that were not there when the gateway could have gone on
    rss_mb: tuple[float, float, float]  # before the crowd came, with it, after its time


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 0 whether or not the goals are met: a missed goal is a finding, not an error."""
    parser = argparse.ArgumentParser(
        prog="listeners",
        usage=argparse.SUPPRESS,  # a mistake is told in one line
        description="Measure a gateway that thousands listen to.",
    )
    parser.add_argument("--quick", action="store_true", help="a small crowd for a moment: shows that it works")
    parser.add_argument("--processes", type=int, default=1, help="of the gateway (1)")
    parser.add_argument("--out", type=Path, help="the JSON file to write (bench/results/listeners-<time>.json)")
    options = parser.parse_args(argv)
    plan = QUICK if options.quick else Plan()
    results = Path(__file__).parent / "results" / f"listeners-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        with Interrupts():
            found = [measure(plan, scene, options.processes) for scene in (SCENES[1:] if options.quick else SCENES)]
    except KeyboardInterrupt:
        sys.stderr.write("listeners: interrupted; everything it started is stopped\n")
        return 130
    rows = [row for each in found for row in _rows(each, plan)]
    print(table(rows))
    about = {**machine(), "quick": options.quick, "processes": options.processes, "plan": vars(plan)}
    save(options.out or results, rows, {**about, "seen": {each.scene.name: each.seen for each in found}})
    return 0


def measure(plan: Plan, scene: Scene, processes: int) -> Found:
    """Have a crowd play a scene in a fleet of its own, with submits before and meanwhile."""
    sys.stderr.write(f"measuring {scene.name} …\n")
    with (
        tempfile.TemporaryDirectory(prefix="zfleet-bench-") as folder,
        Fleet(Path(folder), image_ms=scene.image_ms) as fleet,
        fleet.gateway(processes=processes) as gateway,
        fleet.worker(),
    ):
        return _measure(fleet, gateway, plan, scene)


def _measure(fleet: Fleet, gateway: Gateway, plan: Plan, scene: Scene) -> Found:
    caller = Caller(gateway.port)
    idle = _submits(caller, plan, plan.idle_s)
    suspension.suspend(fleet.redis)  # or the few tasks would be over before all have come
    tasks = [_watched(caller) for _ in range(plan.few if scene.few else plan.spread)]
    before = _rss_mb(gateway)
    with _crowd(gateway, plan, scene) as crowd:
        crowd.tell(*tasks)
        crowd.ready()
        suspension.resume(fleet.redis)
        there = _rss_mb(gateway)
        crowd.tell("go")
        began, spent, waited = time.monotonic(), _all(cpu_s, gateway), _all(waited_s, gateway)
        busy = _submits(caller, plan, plan.seconds, lambda: scene.few and crowd.tell(_watched(caller)))
        lasted = time.monotonic() - began
        spent, waited = _all(cpu_s, gateway) - spent, _all(waited_s, gateway) - waited
        after = _rss_mb(gateway)
        seen = crowd.stop() | {"seconds": lasted}
    caller.close()
    return Found(scene, idle, busy, seen, spent / lasted, waited / lasted, (before, there, after))


def _watched(caller: Caller) -> str:
    """Submit a task that comes before all whose submit is measured; return what to tell the crowd of it."""
    return f"task {caller.submit(priority='high', steps=STEPS)}"


def _submits(caller: Caller, plan: Plan, seconds: float, renew: Callable[[], object] = lambda: None) -> list[float]:
    """Submit at an even pace; return how long each took, in ms. Every other second there is something to `renew`."""
    took = []
    began = renewed = time.monotonic()
    for index in range(int(seconds * plan.submits_per_s)):
        time.sleep(max(0.0, began + index / plan.submits_per_s - time.monotonic()))
        if time.monotonic() - renewed >= RENEW_S:
            renewed = time.monotonic()
            renew()
        at = time.perf_counter()
        caller.submit()
        took.append((time.perf_counter() - at) * 1000)
    return took


class Crowd:
    """Our end of bench.crowd."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdin and process.stdout
        self._in, self._out = process.stdin, process.stdout

    def tell(self, *lines: str) -> None:
        self._in.write("".join(f"{line}\n" for line in lines))
        self._in.flush()

    def ready(self) -> None:
        """Wait until every listener has heard something."""
        if self._out.readline() != "ready\n":
            raise ConnectionError("the crowd is gone")

    def stop(self) -> dict[str, Any]:
        """Return what it saw."""
        self.tell("stop")
        return dict(json.loads(self._out.readline()))


@contextlib.contextmanager
def _crowd(gateway: Gateway, plan: Plan, scene: Scene) -> Iterator[Crowd]:
    numbers = (gateway.port, plan.listeners, plan.pollers, plan.polls_per_s)
    command = [sys.executable, "-m", "bench.crowd", *map(str, numbers), "tagged" if scene.tagged else "plain"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield Crowd(process)
        finally:
            process.kill()


def _rows(found: Found, plan: Plan) -> list[Row]:
    seen, scene = found.seen, found.scene
    polls = sum(count for name, count in seen.items() if name.startswith("polls "))
    share = seen.get("polls 304", 0) / max(1, polls)
    before, there, after = found.rss_mb
    idle, busy = (_percentile(each, 99) for each in (found.idle, found.busy))
    return [
        Row(measure=f"{scene.name}: polls a second", samples=[polls / seen["seconds"]], digits=0,
            goal=round(plan.polls_per_s * 0.99), sense="at least",
            note=f"{plan.listeners} listeners heard {seen.get('events', 0) / seen['seconds']:.0f} events a second; "
            f"{share:.0%} were 304; p50 {seen['poll p50 ms']:.1f} ms, p99 {seen['poll p99 ms']:.1f} ms"),
        Row(measure="… gateway, cores busy", samples=[found.cpu],
            note=f"and for {found.lack:.0%} of the time it stood in line for one"),
        Row(measure="… gateway, RSS", samples=[after], unit="MiB", digits=0,
            note=f"{before:.0f} before the crowd came, {there:.0f} when all were connected"),
        Row(measure="… submits' p99, as a ratio to idle", samples=[busy / idle], goal=3,
            note=f"{busy:.1f} ms against {idle:.1f}; p50 {_percentile(found.busy, 50):.1f} against "
            f"{_percentile(found.idle, 50):.1f}; {plan.submits_per_s} a second"),
    ]  # fmt: skip


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def _all(measure: Callable[[int], float], gateway: Gateway) -> float:
    return sum(measure(pid) for pid in gateway.pids)


def _rss_mb(gateway: Gateway) -> float:
    return sum(psutil.Process(pid).memory_info().rss for pid in gateway.pids) / 2**20


if __name__ == "__main__":
    sys.exit(main())
