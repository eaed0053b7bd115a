"""One command: a fleet of simulated workers on this machine, locust against it, a report and a short table.

- `python loadtest/run.py --workers 4 --users 16 --duration 20`
- `python loadtest/run.py --scale 1,2,4,8`
- `python loadtest/run.py --target http://127.0.0.1:8080 --users 8`
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path, python looks only beside it

from common.errors import FleetError
from loadtest.figures import Figures, save, table
from loadtest.fleet import MODEL, local_fleet
from loadtest.target import NotLoopback, require_loopback
from zfleet.interrupts import Interrupts

ROOT = Path(__file__).resolve().parents[1]
RAMP_S = 2.0  # until all users are there; their pictures are then spread over time
USERS_PER_WORKER = 3
MAX_USERS = 2000
MAX_WORKERS = 64
MAX_DURATION_S = 3600.0
OVERRUN_S = 60.0  # locust is stopped when it has not ended this long after it should have


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 1 if any request failed, 2 for a mistake on the command line, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        _check(options)
    except ValueError as error:
        sys.stderr.write(f"loadtest: {error}\n")
        return 2
    folder: Path = options.out or ROOT / "loadtest" / "results" / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[Figures] = []
    try:
        with Interrupts() as interrupts:
            for workers in options.scale or [options.workers]:
                runs.append(_run(options, workers, folder, interrupts))
    except KeyboardInterrupt:
        sys.stderr.write("loadtest: interrupted; everything it started is stopped\n")
        return 130
    except FleetError as error:
        sys.stderr.write(f"loadtest: {error.message}\n")
        return 1
    save(folder / "summary.json", runs, image_ms=options.image_ms, target=options.target, command=sys.argv[1:])
    print(table(runs))
    print(f"\nReports: {folder}")
    for run in runs:
        if run.failures:
            print(f"{run.failures} failures with {run.workers or 'its'} workers; the first: {run.first_failure}")
    return 1 if any(run.failures for run in runs) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loadtest",
        usage=argparse.SUPPRESS,  # a mistake is told in one line
        description="Load-test a fleet on this machine with locust.",
    )
    parser.add_argument("--workers", type=int, help="simulated workers to start (4)")
    parser.add_argument("--scale", type=_counts, metavar="1,2,4,8", help="a run each with so many workers")
    parser.add_argument("--users", type=int, help=f"users ({USERS_PER_WORKER} a worker)")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds that are measured (20)")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds before, once all users are there (3)")
    parser.add_argument("--image-ms", type=float, help="what a picture costs a simulated worker (320)")
    parser.add_argument("--arrivals", type=float, default=0.0, help="open arrivals a second instead of a closed loop")
    parser.add_argument("--model", default="", help="alias to ask for; the gateway's default")
    parser.add_argument("--target", help="a gateway that runs already on this machine, instead of a fleet of our own")
    parser.add_argument("--out", type=Path, help="folder for the reports (loadtest/results/<time>)")
    parser.add_argument("--verbose", action="store_true", help="tell what the fleet does")
    return parser


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 1,2,4,8") from None


def _check(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on each other; raises ValueError with one line for what cannot be."""
    if options.target:
        options.target = require_loopback(options.target)
        if options.scale:
            raise NotLoopback("--scale starts fleets of its own; leave --target out")
    else:
        options.image_ms = 320.0 if options.image_ms is None else options.image_ms
        options.workers = 4 if options.workers is None else options.workers
        options.model = options.model or MODEL
        if options.model != MODEL:
            raise ValueError(f"the fleet started here serves {MODEL} alone; use --target for {options.model}")
    for workers in options.scale or [1 if options.workers is None else options.workers]:
        _within("workers", workers, 1, MAX_WORKERS)
        _within("users", _users(options, workers), 1, MAX_USERS)
    _within("duration", options.duration, 1, MAX_DURATION_S)
    _within("warm-up", options.warm_up, 0, MAX_DURATION_S)
    _within("image-ms", 1 if options.image_ms is None else options.image_ms, 1, 600_000)
    _within("arrivals", options.arrivals, 0, 1000)


def _within(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise ValueError(f"--{name} must be from {lowest:g} to {highest:g}, not {value:g}")


def _users(options: argparse.Namespace, workers: int | None) -> int:
    return int(options.users if options.users is not None else USERS_PER_WORKER * (workers or 4))


def _run(options: argparse.Namespace, workers: int | None, folder: Path, interrupts: Interrupts) -> Figures:
    """Run locust once, against the target or against a fleet that lives as long as the run."""
    if options.scale:
        folder = folder / f"workers-{workers}"
        folder.mkdir(exist_ok=True)
    users = _users(options, workers)
    if options.target:
        _locust(options, options.target, users, workers, folder)
    else:
        assert workers
        print(f"{workers} workers at {options.image_ms:g} ms, {users} users, {options.duration:g} s …", flush=True)
        with local_fleet(
            interrupts, workers=workers, image_ms=options.image_ms, log_dir=folder / "logs", verbose=options.verbose
        ) as url:
            _locust(options, url, users, workers, folder)
    return Figures.read(folder / "figures.json", workers=workers, users=users, image_ms=options.image_ms)


def _locust(options: argparse.Namespace, url: str, users: int, workers: int | None, folder: Path) -> None:
    """Run locust headless in a process group of its own, and see that it ends whatever happens here."""
    run_s = math.ceil(RAMP_S + options.warm_up + options.duration)  # locust takes whole seconds
    finish_s = math.ceil(20 + users / (workers or 1) * (options.image_ms or 30_000) / 1000)  # for what is in hand then
    command = [
        sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless", "--host", url,
        "--users", str(users), "--spawn-rate", f"{max(1.0, users / RAMP_S):g}", "--run-time", f"{run_s}s",
        "--stop-timeout", str(finish_s), "--only-summary", "--loglevel", "WARNING",
        "--html", str(folder / "report.html"), "--csv", str(folder / "locust"),
        "--figures", str(folder / "figures.json"), "--warm-up-s", f"{options.warm_up:g}",
        "--arrivals-per-s", f"{options.arrivals:g}", "--model", options.model,
    ]  # fmt: skip
    (folder / "figures.json").unlink(missing_ok=True)
    with (folder / "locust.log").open("wb") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
        )
        try:
            child.wait(run_s + finish_s + OVERRUN_S)
        except subprocess.TimeoutExpired:
            sys.stderr.write("loadtest: locust did not end in time and is stopped\n")
        finally:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Stop a process that still runs: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5.0)


if __name__ == "__main__":
    sys.exit(main())
