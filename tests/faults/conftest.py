"""What the fault tests share: a fleet each, and the table at the end of the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults import table
from tests.faults.books import Report

NoteFn = Callable[..., None]


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> NoteFn:
    """Put a fault into the table: note("kill -9 of a worker", times, report, recovery_s)."""

    def note_one(fault: str, times: int, report: Report | table.Count, recovery_s: Sequence[float] = ()) -> None:
        record_property(table.PROPERTY, table.Row.of(fault, times, report, recovery_s).as_property())

    return note_one


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = list(_rows(terminalreporter))
    if not rows:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(table.markdown(rows))
    if page := os.environ.get("ZFLEET_FAULTS_REPORT"):
        table.write(Path(page), rows, os.environ.get("ZFLEET_FAULTS_COMMAND", "pytest tests/faults"))
        terminalreporter.write_line(f"\nwritten to {page}")


def _rows(terminalreporter: pytest.TerminalReporter) -> Iterator[table.Row]:
    outcomes = ("passed", "failed", "xfailed", "xpassed")
    reports = [report for outcome in outcomes for report in terminalreporter.getreports(outcome)]
    for report in sorted(reports, key=lambda report: report.nodeid):
        for name, value in getattr(report, "user_properties", ()):
            if name == table.PROPERTY and report.when == "call":
                yield table.Row(**value)
