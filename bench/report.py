"""Rows of measures against their goals, the machine they were made on, a Markdown table and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

PACKAGES = ("flask", "gevent", "gunicorn", "hiredis", "pydantic", "redis", "rq", "flask-openapi3")
HEAD = ("measure", "value", "goal", "met", "note")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure: the median of its samples, and the goal it should be `at most` or `at least`, if it has one."""

    measure: str
    samples: Sequence[float]
    unit: str = ""
    digits: int = 2
    goal: float | None = None
    sense: Literal["at most", "at least"] = "at most"
    note: str = ""

    @property
    def value(self) -> float:
        return statistics.median(self.samples)

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached, as the figures are shown; None without one."""
        if self.goal is None:
            return None
        shown = round(self.value, self.digits)
        return shown <= self.goal if self.sense == "at most" else shown >= self.goal

    def cells(self) -> tuple[str, ...]:
        """Return the table's cells; with several samples the note tells their range."""
        unit = f" {self.unit}" if self.unit else ""
        goal = "" if self.goal is None else f"{'≤' if self.sense == 'at most' else '≥'} {self.goal:g}{unit}"
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        low, high = (f"{bound:.{self.digits}f}" for bound in (min(self.samples), max(self.samples)))
        spread = f"{low} to {high} in {len(self.samples)} runs" if len(self.samples) > 1 and low != high else ""
        note = "; ".join(part for part in (self.note, spread) if part)
        return (self.measure, f"{self.value:.{self.digits}f}{unit}", goal, met, note)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [HEAD, ("---", "---:", "---:", "---", "---"), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return what the figures depend on, the versions of these packages among it."""
    model = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "commit": _commit(),
        "cores": os.cpu_count(),
        "processor": model[0] if model else platform.processor(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def save(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write rows, samples and machine as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [
        asdict(row)
        | {"samples": [round(each, 4) for each in row.samples], "value": round(row.value, 4), "met": row.met}
        for row in rows
    ]
    path.write_text(json.dumps({**about, "rows": written}, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except OSError:
        return []


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
