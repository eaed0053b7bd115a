"""What a run measured, from the figures that locust counted, and the table that shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

HEAD = ("workers", "users", "images", "seconds", "images/s", "ideal", "of ideal", "of linear", "p50 ms", "p95 ms",
        "p99 ms", "later", "failures")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One run. Times in ms are to the picture, from the submit to its last byte; `seconds` is the time measured."""

    workers: int | None
    users: int
    images: int
    seconds: float
    images_per_s: float
    ideal_per_s: float | None  # None where the fleet is not ours to know
    p50_ms: float
    p95_ms: float
    p99_ms: float
    later: int  # submits and polls answered with 429 or 503 and Retry-After, and then obeyed
    failures: int  # since the start of the run, warm-up included
    first_failure: str

    @classmethod
    def read(cls, path: Path, *, workers: int | None, users: int, image_ms: float | None) -> Self:
        """Return the figures that the locustfile wrote; without any, one failure that says so."""
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            found = {"failures": 1, "first_failure": "locust left no figures; see locust.log"}
        if not found.get("images"):
            found["first_failure"] = found.get("first_failure") or "no picture came in the time measured"
            found["failures"] = found.get("failures") or 1
        ideal = workers * 1000 / image_ms if workers and image_ms else None
        numbers = {name: found.get(name, 0) for name in _COUNTED}
        return cls(workers=workers, users=users, ideal_per_s=ideal, first_failure=found["first_failure"], **numbers)

    @property
    def of_ideal(self) -> float | None:
        """Pictures per second as a share of what the workers could make if nothing else took time."""
        return self.images_per_s / self.ideal_per_s if self.ideal_per_s else None

    def of_linear(self, first: Figures) -> float | None:
        """Pictures per second as a share of the first run's, times as many workers."""
        if not (self.workers and first.workers and first.images_per_s):
            return None
        return self.images_per_s / (first.images_per_s / first.workers * self.workers)

    def row(self, first: Figures) -> list[str]:
        """Return the table's cells."""
        return [
            _show(self.workers, "d"), str(self.users), str(self.images), f"{self.seconds:.1f}",
            f"{self.images_per_s:.2f}", _show(self.ideal_per_s, ".2f"), _show(self.of_ideal, ".3f"),
            _show(self.of_linear(first), ".3f"), f"{self.p50_ms:.0f}", f"{self.p95_ms:.0f}", f"{self.p99_ms:.0f}",
            str(self.later), str(self.failures),
        ]  # fmt: skip


_COUNTED = ("images", "seconds", "images_per_s", "p50_ms", "p95_ms", "p99_ms", "later", "failures")


def table(runs: Sequence[Figures]) -> str:
    """Return the runs as a Markdown table; the first is what linear is measured against."""
    lines = [HEAD, tuple("-" * (len(name) - 1) + ":" for name in HEAD), *(run.row(runs[0]) for run in runs)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def save(path: Path, runs: Sequence[Figures], **about: object) -> None:
    """Write the runs and what is known about them as JSON."""
    rows = [asdict(run) | {"of_ideal": run.of_ideal, "of_linear": run.of_linear(runs[0])} for run in runs]
    path.write_text(json.dumps({**about, "runs": rows}, indent=1) + "\n", "utf-8")


def _show(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
