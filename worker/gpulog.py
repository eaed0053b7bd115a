"""gpu.csv: what the GPUs of this machine held and did, a line each time that the driver was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from common.cards import GpuReading
from common.logfiles import open_log

HEADER = "timestamp,gpu,used_mb,free_mb,utilisation"  # UTC; index by bus order; MiB; percent


def keeper(log_dir: Path | None) -> Callable[[Iterable[GpuReading]], None]:
    """Return what to call with new readings; without a folder for logs nothing is kept. Raises ConfigurationError."""
    if log_dir is None:
        return lambda _readings: None
    file = open_log(log_dir, lambda slot: f"gpu-{slot}.csv" if slot else "gpu.csv", HEADER)

    def keep(readings: Iterable[GpuReading]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        for reading in readings:
            file.append(f"{now},{_row(reading)}")

    return keep


def _row(reading: GpuReading) -> str:
    """Return the other columns; what the driver does not give is left empty."""
    used, total = reading.memory_used_mb, reading.memory_total_mb
    free = total - used if used is not None and total is not None else None
    figures = (reading.index, used, free, reading.utilisation_percent)
    return ",".join("" if figure is None else str(figure) for figure in figures)
