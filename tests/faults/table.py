"""One row per fault: how often it was thrown, what it cost, and how long recovery took."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults.books import Report

PROPERTY = "fault"  # under this name a row travels with its test's report, also from another process (xdist)
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = ("fault", "times", "tasks", "lost", "doubled", "recovery p50", "max")


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
    def of(cls, fault: str, times: int, report: Report, recovery_s: Sequence[float] = ()) -> Row:
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
