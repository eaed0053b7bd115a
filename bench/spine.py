"""What the way of a task costs beside the picture itself, measured on `simulated`, with stock RQ in the same run.

`python bench/spine.py` takes some minutes, `python bench/spine.py --quick` half a one with less to rely on. Prints a
Markdown table and writes bench/results/spine-<time>.json. How each figure is measured: bench/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, python looks only beside it

from bench import counting, cpu, latency, picture, stock_rq, throughput
from bench.fleet import Fleet, Gateway
from bench.report import Row, machine, save, table
from common.apikeys import ApiKey, Token
from zfleet.interrupts import Interrupts

IMAGE_MS = 50.0
CALLERS = 3
CONNECTIONS = 16
WAITERS = 64  # connections that wait for their task, so that the gateway has something to do meanwhile


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    repeats: int = 5
    idle_s: float = 5.0
    counted: int = 40
    tasks: int = 150
    latencies: int = 60
    pictures: int = 60
    load_s: float = 3.0
    rounds: int = 7


QUICK = Plan(repeats=1, idle_s=1.0, counted=6, tasks=20, latencies=8, pictures=10, load_s=0.5, rounds=2)


class Submits(NamedTuple):
    """The ratio's row, and the processor milliseconds of each bare call."""

    row: Row
    bare_ms: list[float]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 0 whether or not the goals are met: a missed goal is a finding, not an error."""
    parser = argparse.ArgumentParser(
        prog="spine",
        usage=argparse.SUPPRESS,  # a mistake is told in one line
        description="Measure the spine of zfleet, and stock RQ beside it.",
    )
    parser.add_argument("--quick", action="store_true", help="few tasks, one repeat: shows that it works")
    parser.add_argument("--out", type=Path, help="the JSON file to write (bench/results/spine-<time>.json)")
    options = parser.parse_args(argv)
    plan = QUICK if options.quick else Plan()
    results = Path(__file__).parent / "results" / f"spine-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    try:
        with (
            Interrupts(),
            tempfile.TemporaryDirectory(prefix="zfleet-bench-") as folder,
            Fleet(Path(folder), image_ms=IMAGE_MS) as fleet,
        ):
            about = machine() | {"redis_server": str(fleet.redis.info("server")["redis_version"])}
            speed = [picture.calibration_ms()]
            rows = measure(fleet, plan)
            speed.append(picture.calibration_ms())
    except KeyboardInterrupt:
        sys.stderr.write("spine: interrupted; everything it started is stopped\n")
        return 130
    print(table(rows))
    save(options.out or results, rows, {**about, "calibration_ms": speed, "quick": options.quick, "plan": vars(plan)})
    return 0


def measure(fleet: Fleet, plan: Plan) -> list[Row]:
    """Return every row, in the order of the table."""
    with fleet.gateway() as gateway:
        with fleet.worker() as worker, stock_rq.worker(fleet) as stock:
            _say("Redis commands")
            commands = _commands(fleet, gateway, plan)
            _say("the worker's processor time and throughput")
            costs = _costs(fleet, gateway, worker, stock, plan)
            leisure = _at_leisure(gateway, plan)
        with fleet.worker(clock=fleet.folder / "plain.clock", plain_sleep=True) as worker:
            costs.append(_plain(fleet, gateway, worker, plan))
        with fleet.worker(clock=fleet.folder / "steps.clock"):
            _say("latencies")
            latencies = _latencies(fleet, gateway, plan)
        with fleet.gateway("bench.bare_app:app") as bare:
            _say("the gateway's processor time and throughput")
            with fleet.worker(stub=True):
                busy = [throughput.busy(gateway, "tasks", plan.load_s, WAITERS) for _ in range(plan.rounds)]
            submits = _submits(fleet, gateway, bare, plan)
        with fleet.worker():
            _say("Redis commands with an API key")
            commands += _keyed_commands(fleet, gateway, plan)  # the last thing: from here on nobody is served without
    return [*commands, *_gateway(busy, submits), leisure, *costs, *latencies, submits.row]


def _commands(fleet: Fleet, gateway: Gateway, plan: Plan) -> list[Row]:
    mine = counting.ours(fleet, gateway.port, plan.counted)
    theirs = counting.stock(fleet, plan.counted, IMAGE_MS / 1000)
    return [
        Row(measure="Redis commands a task, as clients send them", samples=[mine.wire], goal=14,
            note=f"idle worker, submit to finish and one status wait: {_names(mine)}"),
        Row(measure="… with those that scripts run inside Redis", samples=[mine.total], digits=1),
        Row(measure="… stock RQ, as clients send them", samples=[theirs.wire], digits=1,
            note=f"{theirs.total:.1f} with those inside scripts"),
    ]  # fmt: skip


def _keyed_commands(fleet: Fleet, gateway: Gateway, plan: Plan) -> list[Row]:
    open_to_all = counting.ours(fleet, gateway.port, plan.counted)
    token = Token.new()
    fleet.broker.put_key(
        ApiKey(
            key_id=token.key_id, digest=token.digest, tenant="acme", rate="1000/s", max_queued=1000, max_running=1000,
            created_at=datetime.now(UTC),
        ),
        share=2,
    )  # fmt: skip
    keyed = counting.ours(fleet, gateway.port, plan.counted, str(token))
    more = {name: keyed.by_name.get(name, 0) - open_to_all.by_name.get(name, 0) for name in ("submit", "claim")}
    return [
        Row(measure="… more of them for a tenant", samples=[keyed.wire - open_to_all.wire], goal=2,
            note="API key with rate, quotas and share, and an Idempotency-Key each time, against none of it in the "
                 f"same run: {_names(keyed)}, the EVALSHA being the rate's; submit {more['submit']:+.2f}, "
                 f"claim {more['claim']:+.2f}"),
        Row(measure="… and inside Redis", samples=[keyed.total - open_to_all.total], digits=1),
    ]  # fmt: skip


def _names(commands: counting.Commands) -> str:
    return ", ".join(f"{name} {count:.2f}" for name, count in sorted(commands.by_name.items()))


def _gateway(busy: Sequence[throughput.Costs], submits: Submits) -> list[Row]:
    rate = statistics.median(each.per_s for each in busy)
    floor = statistics.median(submits.bare_ms)
    return [
        Row(measure="gateway CPU a task", samples=[each.cpu_ms for each in busy], unit="ms", goal=1.5,
            note=f"submit and one status wait, {WAITERS} connections, {rate:.0f} tasks a second, nothing is drawn"),
        Row(measure="… two calls of a bare Flask view", samples=[2 * each for each in submits.bare_ms], unit="ms",
            note=f"as busy: what HTTP, gunicorn and Flask take here before anything is done, {floor:.2f} ms a call"),
    ]  # fmt: skip


def _at_leisure(gateway: Gateway, plan: Plan) -> Row:
    idle = cpu.idle(gateway.pid, plan.idle_s)
    found = [throughput.at_leisure(gateway, plan.tasks, CALLERS, idle) for _ in range(plan.repeats)]
    rate = statistics.median(each.per_s for each in found)
    return Row(measure="… the gateway with little to do", samples=[each.cpu_ms for each in found], unit="ms",
               note=f"{CALLERS} callers, {rate:.0f} tasks a second: caches are cold each time")  # fmt: skip


def _costs(fleet: Fleet, gateway: Gateway, worker: int, stock: int, plan: Plan) -> list[Row]:
    idle = {pid: cpu.idle(pid, plan.idle_s) for pid in (worker, stock)}
    mine: list[throughput.Backlog] = []
    theirs: list[throughput.Backlog] = []
    drawn: list[float] = []
    for _ in range(plan.repeats):
        mine.append(throughput.ours(fleet, gateway.port, worker, plan.tasks, IMAGE_MS, idle[worker]))
        theirs.append(throughput.stock(fleet, stock, plan.tasks, IMAGE_MS, idle[stock]))
        drawn.append(picture.cost_ms(fleet.settings, plan.pictures))
    spared = [whole.cpu_ms - alone for whole, alone in zip(mine, drawn, strict=True)]
    return [
        Row(measure="worker CPU a task, all of it", samples=[each.cpu_ms for each in mine], unit="ms", note="backlog"),
        Row(measure="… the picture alone", samples=drawn, unit="ms",
            note=f"{picture.STEPS} simulated steps, draw, 16x16 PNG, store; same code and pace, nothing around it"),
        Row(measure="… worker bookkeeping", samples=spared, unit="ms", goal=1.2, note="all of it less the picture"),
        Row(measure="… stock RQ, worker CPU a job", samples=[each.cpu_ms for each in theirs], unit="ms",
            note="its job is one sleep, which costs next to nothing"),
        Row(measure="Redis CPU a task", samples=[each.redis_ms for each in mine], unit="ms"),
        Row(measure="… stock RQ", samples=[each.redis_ms for each in theirs], unit="ms"),
        Row(measure="share of ideal throughput", samples=[each.share for each in mine], digits=3, goal=0.98,
            sense="at least", note=f"one worker, {IMAGE_MS:g} ms a picture, backlog"),
        Row(measure="… stock RQ", samples=[each.share for each in theirs], digits=3, note="SimpleWorker, as many naps"),
    ]  # fmt: skip


def _plain(fleet: Fleet, gateway: Gateway, worker: int, plan: Plan) -> Row:
    idle = cpu.idle(worker, plan.idle_s)
    found = [
        throughput.ours(fleet, gateway.port, worker, plan.tasks, IMAGE_MS, idle, steps=1) for _ in range(plan.repeats)
    ]
    note = (
        "one step that sleeps its full time, as RQ's job does: no schedule makes up for late timers; "
        f"{statistics.median(each.cpu_ms for each in found):.2f} ms worker CPU a task, picture included"
    )
    shares = [each.share for each in found]
    return Row(measure="… zfleet with such a nap for a picture", samples=shares, digits=3, note=note)


def _latencies(fleet: Fleet, gateway: Gateway, plan: Plan) -> list[Row]:
    runs = [latency.one_by_one(fleet.folder / "steps.clock", gateway.port, plan.latencies) for _ in range(plan.repeats)]
    claimed = statistics.median(statistics.median(run.claimed) for run in runs)
    pick_up = [statistics.median(run.pick_up) for run in runs]
    answered = [statistics.median(run.answered) for run in runs]
    return [
        Row(measure="idle pick-up, submit to first step, p50", samples=pick_up, unit="ms", goal=5,
            note=f"from before the POST is sent; created to claimed, both in Redis: {claimed:.0f} ms"),
        Row(measure="status wait answered after finish, p50", samples=answered, unit="ms", goal=10,
            note="from the finish in Redis, told in whole ms, so up to 1 ms too long"),
    ]  # fmt: skip


def _submits(fleet: Fleet, gateway: Gateway, bare: Gateway, plan: Plan) -> Submits:
    found: dict[int, list[throughput.Costs]] = {gateway.port: [], bare.port: []}
    for turn in range(plan.rounds + 1):
        for server in (gateway, bare):
            costs = throughput.busy(server, "submits", plan.load_s, CONNECTIONS)
            if turn:  # the first warms up
                found[server.port].append(costs)
            fleet.redis.flushall()
    ours, theirs = (statistics.median(each.per_s for each in costs) for costs in found.values())
    note = (
        f"{ours:.0f}/s against {theirs:.0f}/s, medians of {plan.rounds} rounds in turn, {CONNECTIONS} connections; "
        f"{statistics.median(each.cpu_ms for each in found[gateway.port]):.2f} ms CPU a submit"
    )
    row = Row(measure="submits through gunicorn, as a ratio to a bare Flask view", samples=[ours / theirs],
              goal=0.5, sense="at least", note=note)  # fmt: skip
    return Submits(row, [each.cpu_ms for each in found[bare.port]])


def _say(text: str) -> None:
    sys.stderr.write(f"measuring {text} …\n")


if __name__ == "__main__":
    sys.exit(main())
