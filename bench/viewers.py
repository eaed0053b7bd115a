"""What those who look at the dashboard cost the gateway.

`python -m bench.viewers` takes two minutes, `--quick` some seconds with less to rely on. Prints a Markdown table and
writes bench/results/viewers-<time>.json. How each figure is measured: bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from bench.caller import Caller
from bench.cpu import cpu_s
from bench.fleet import HOST, Fleet, Gateway, NotUp
from bench.report import Row, machine, save, table
from common.broker import Broker
from zfleet.interrupts import Interrupts

IMAGE_MS = 150.0
BEAT_S = 3.0
HISTORY_EVERY_S = 10.0  # as the page asks while it shows a quarter of an hour
GOAL = 0.05  # of a core
TOLD_WITHIN_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    viewers: int = 10
    workers: int = 16
    submits_per_s: float = 5.0
    rounds: int = 5
    seconds: float = 10.0


QUICK = Plan(viewers=3, workers=4, rounds=1, seconds=1.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 0 whether or not the goal is met: a missed goal is a finding, not an error."""
    parser = argparse.ArgumentParser(
        prog="viewers", usage=argparse.SUPPRESS, description="Measure a gateway whose dashboard is looked at."
    )
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it works")
    parser.add_argument("--out", type=Path, help="the JSON file to write (bench/results/viewers-<time>.json)")
    options = parser.parse_args(argv)
    plan = QUICK if options.quick else Plan()
    results = Path(__file__).parent / "results" / f"viewers-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    try:
        with Interrupts():
            rows = measure(plan)
    except KeyboardInterrupt:
        sys.stderr.write("viewers: interrupted; everything it started is stopped\n")
        return 130
    print(table(rows))
    save(options.out or results, rows, {**machine(), "quick": options.quick, "plan": vars(plan)})
    return 0


def measure(plan: Plan) -> list[Row]:
    """Compare rounds without and with viewers, in turn, in a fleet under load."""
    with (
        tempfile.TemporaryDirectory(prefix="zfleet-bench-") as folder,
        Fleet(Path(folder), image_ms=IMAGE_MS) as fleet,
        fleet.gateway() as gateway,
        fleet.worker(),
        _more_workers(fleet.broker, plan.workers - 1),
        _load(gateway, plan.submits_per_s),
    ):
        without, watched, heard = [], [], []
        for _ in range(plan.rounds):
            without.append(_busy(gateway, plan.seconds))
            with _viewers(gateway, plan.viewers) as told:
                _await_all(told)
                before = sum(told)
                watched.append(_busy(gateway, plan.seconds))
                heard.append((sum(told) - before) / plan.viewers / plan.seconds)
    cost = [with_ - bare for with_, bare in zip(watched, without, strict=True)]
    return [
        Row(measure="gateway, cores busy, nobody looks", samples=without, digits=3,
            note=f"{plan.submits_per_s:g} submits a second"),
        Row(measure=f"… {plan.viewers} look at the dashboard", samples=watched, digits=3,
            note=f"each is told {min(heard):.1f} to {max(heard):.1f} times a second; {plan.workers} workers"),
        Row(measure="… what looking costs", samples=cost, digits=3, goal=GOAL,
            note="the difference of each two rounds in turn"),
    ]  # fmt: skip


def _await_all(told: Sequence[int]) -> None:
    """Wait until each viewer has been told the first time; raises NotUp."""
    until = time.monotonic() + TOLD_WITHIN_S
    while not all(told):
        if time.monotonic() > until:
            raise NotUp(f"{told.count(0)} of {len(told)} viewers were told nothing in {TOLD_WITHIN_S:g} s")
        time.sleep(0.05)


def _busy(gateway: Gateway, seconds: float) -> float:
    """Return how many cores the gateway keeps busy over so long."""
    began, spent = time.monotonic(), sum(map(cpu_s, gateway.pids))
    time.sleep(seconds)
    return (sum(map(cpu_s, gateway.pids)) - spent) / (time.monotonic() - began)


@contextlib.contextmanager
def _more_workers(broker: Broker, count: int) -> Iterator[None]:
    """Have so many more workers beat as the real one does. They claim nothing."""
    (card,) = broker.workers()
    slots = [f"{card.host}.gpu{index}" for index in range(count)]
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S / max(1, count)):
            slots.append(slots.pop(0))
            broker.beat(card.model_copy(update={"name": f"{slots[0]}.000000", "seen_at": datetime.now(UTC)}), [], 60)

    with _thread(beat, done):
        yield


@contextlib.contextmanager
def _load(gateway: Gateway, submits_per_s: float) -> Iterator[None]:
    """Submit at an even pace."""
    caller, done = Caller(gateway.port), threading.Event()

    def submit() -> None:
        while not done.wait(1 / submits_per_s):
            caller.submit()

    with _thread(submit, done), contextlib.closing(caller):
        yield


@contextlib.contextmanager
def _viewers(gateway: Gateway, count: int) -> Iterator[list[int]]:
    """Have so many look at the dashboard as its page does; yields how often each was told the fleet's state."""
    told, done = [0] * count, threading.Event()

    def look(index: int) -> None:
        stream = http.client.HTTPConnection(HOST, gateway.port, timeout=30)
        stream.request("GET", "/api/fleet/events")
        answer = stream.getresponse()
        while not done.is_set() and (line := answer.readline()):
            told[index] += line.startswith(b"data:")
        stream.close()

    def history(index: int) -> None:
        done.wait(HISTORY_EVERY_S * index / count)
        while not done.is_set():
            asked = http.client.HTTPConnection(HOST, gateway.port, timeout=30)
            asked.request("GET", "/api/history?window=15m")
            asked.getresponse().read()
            asked.close()
            done.wait(HISTORY_EVERY_S)

    with contextlib.ExitStack() as running:
        for index in range(count):
            for work in (look, history):
                running.enter_context(_thread(partial(work, index), done))
        yield told


@contextlib.contextmanager
def _thread(work: Callable[[], None], done: threading.Event) -> Iterator[None]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
