"""One row per fault: how often it was thrown, what it cost, and how long recovery took."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.broker import Broker
from common.settings import Settings
from common.storage.local import PARTIAL
from tests.faults.books import LEFTOVERS_GO_S, Report

PROPERTY = "fault"  # under this name a row travels with its test's report, also from another process (xdist)
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = ("fault", "times", "tasks", "lost", "doubled", "recovery p50", "max")


@dataclass(frozen=True, kw_only=True)
class Count:
    """What became of the tasks of a test that has no ledger and no gateway: by their records, and by the files."""

    accepted: int
    lost: int  # unknown, never final, or succeeded without its pictures; and two submits that became one task
    doubled: int  # succeeded twice; a task that nobody submitted; a picture that no record names
    problems: list[str]

    @classmethod
    def of(cls, broker: Broker, settings: Settings, task_ids: Sequence[str], *, within_s: float = 60.0) -> Count:
        """Wait until the tasks, one id for each submit, are final, and count. What is wrong still is counted."""
        until = time.monotonic() + within_s
        while time.monotonic() < until and any(_open(broker, task_id) for task_id in task_ids):
            time.sleep(0.05)
        until = time.monotonic() + LEFTOVERS_GO_S  # a run that has just been refused may still be removing its files
        while (count := cls._now(broker, settings, task_ids)).problems and time.monotonic() < until:
            time.sleep(0.2)
        return count

    @classmethod
    def _now(cls, broker: Broker, settings: Settings, task_ids: Sequence[str]) -> Count:
        lost, doubled, named = [], [], set()
        for task_id, submits in Counter(task_ids).items():
            lost += [f"{task_id} is the answer to {submits} submits"] * (submits - 1)
        for task_id in set(task_ids):
            task = broker.view(task_id)
            if task is None or not task.status.final:
                lost.append(f"{task_id} is {task.status if task else 'unknown'}")
                continue
            named |= {image.key for image in task.images}
            paths = [settings.results_dir / image.key for image in task.images]
            whole = all(
                path.is_file() and path.stat().st_size == image.bytes
                for path, image in zip(paths, task.images, strict=True)
            )
            if task.status == "succeeded" and not (whole and len(paths) == task.request.n):
                lost.append(f"{task_id} succeeded, and its pictures are not there")
            if [attempt.outcome for attempt in task.attempts].count("succeeded") > 1:
                doubled.append(f"{task_id} succeeded more than once")
        listed, _ = broker.tasks("default", status=None, limit=100_000, before=None)
        doubled += [f"{task.task_id} was submitted by nobody" for task in listed if task.task_id not in task_ids]
        for path in settings.results_dir.rglob("*"):
            name = str(path.relative_to(settings.results_dir))
            if path.is_file() and not name.endswith(PARTIAL) and name not in named:
                doubled.append(f"{name} is a picture that no record names")
        return cls(accepted=len(task_ids), lost=len(lost), doubled=len(doubled), problems=lost + doubled)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault. Recovery in seconds, one figure for each time it was measured; None where there is nothing to time."""

    fault: str
    times: int
    tasks: int
    lost: int
    doubled: int
    p50_s: float | None
    max_s: float | None

    @classmethod
    def of(cls, fault: str, times: int, report: Report | Count, recovery_s: Sequence[float] = ()) -> Row:
        median, worst = (statistics.median(recovery_s), max(recovery_s)) if recovery_s else (None, None)
        return cls(
            fault=fault, times=times, tasks=report.accepted, lost=report.lost, doubled=report.doubled,
            p50_s=median, max_s=worst,
        )  # fmt: skip

    def as_property(self) -> dict[str, Any]:
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        timed = ("" if value is None else f"{value:.2f} s" for value in (self.p50_s, self.max_s))
        return (self.fault, *(f"{n:,}" for n in (self.times, self.tasks, self.lost, self.doubled)), *timed)


def _open(broker: Broker, task_id: str) -> bool:
    task = broker.view(task_id)
    return task is not None and not task.status.final


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [HEAD, ("---", *["---:"] * (len(HEAD) - 1)), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Return what the figures depend on; not whose machine it was."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text("utf-8") if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{os.cpu_count()} cores, {model[1] if model else platform.processor() or platform.machine()}"


def write(path: Path, rows: Sequence[Row], command: str) -> None:
    """Replace what stands between the markers of a page by the table, its command, machine and date."""
    about = f"`{command}` on {machine()}, {datetime.now(UTC):%Y-%m-%d}:"
    text = path.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no place for the table: {BEGIN} … {END}")
    path.write_text(f"{before}{BEGIN}\n{about}\n\n{markdown(rows)}\n{END}{after}", "utf-8")
