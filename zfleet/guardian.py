"""Stops a stack's processes, in order, when the stack itself was killed and could not.

Run as a script with the standard library alone. It reads `start <pid> <rank> <grace_s>` and `gone <pid>` lines from
stdin; the end of stdin means that whoever held the other end is no more, however that came about. The processes still
listed are then stopped, highest rank first: SIGTERM, and after the grace SIGKILL for the whole process group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

POLL_S = 0.05


def main() -> None:
    """Read until the end, then stop what is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it has nothing to save and ends with its stack
    watched: dict[int, tuple[int, float]] = {}
    for line in sys.stdin:
        word, pid, *rest = line.split()
        if word == "start":
            watched[int(pid)] = (int(rest[0]), float(rest[1]))
        else:
            watched.pop(int(pid), None)
    for pid, (_, grace_s) in sorted(watched.items(), key=lambda item: -item[1][0]):
        stop(pid, grace_s)


def stop(pid: int, grace_s: float) -> None:
    """Stop a process that leads its group, then whatever it left in the group."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + grace_s
    while alive(pid) and time.monotonic() < until:
        time.sleep(POLL_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has collected yet does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:
        return True  # no /proc here: the signal above found it
    return state != "Z"


if __name__ == "__main__":
    main()
