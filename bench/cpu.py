"""Processor time of another process, and what of it is idling."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil


def cpu_s(pid: int) -> float:
    """Return the seconds of processor time, user and system, that all threads of a process have had.

    From the kernel's CPU clock of that process, in nanoseconds, where there is one (Linux); else from psutil, in ticks.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)  # CPUCLOCK_SCHED, as clock_getcpuclockid(3) makes it
    except OSError:
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)


def waited_s(pid: int) -> float:
    """Return the seconds that a process' first thread was ready to run and had no core (Linux; elsewhere 0)."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text("ascii").split()[1]) / 1e9
    except OSError:
        return 0.0


@dataclass(frozen=True, slots=True)
class Spent:
    """Processor and wall seconds."""

    cpu_s: float
    wall_s: float

    def per_task_ms(self, tasks: int, idle: Spent) -> float:
        """Return the milliseconds a task cost beyond what the process spends in as long a time without any."""
        return (self.cpu_s - idle.cpu_s / idle.wall_s * self.wall_s) / tasks * 1000


def spent(pid: int, action: Callable[[], object]) -> Spent:
    """Return what a process spends while `action` runs here."""
    cpu, wall = cpu_s(pid), time.monotonic()
    action()
    return Spent(cpu_s(pid) - cpu, time.monotonic() - wall)


def idle(pid: int, seconds: float) -> Spent:
    """Return what a process spends when left alone for so long."""
    return spent(pid, lambda: time.sleep(seconds))
