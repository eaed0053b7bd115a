"""What a process tells whoever keeps it running.

systemd is told by sd_notify(3): NAME=value lines in a datagram. Without a manager that listens it is silence, and one
that does not read holds up nobody. A container's probe looks at a file, which grows old when there is no sign of life.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from pathlib import Path

from common.settings import take_service_manager

TELL_S = 5.0  # at the longest between two signs of life, whatever the watchdog allows
EXTEND_S = 30  # a start or a stop may go on this long after each sign of life
STALE_S = 30.0  # a file that is older tells of a process that hangs
READY, STARTING = "ready", "starting"  # how such a file begins


class ServiceManager:
    """One process's line to its manager, which it tells that it is ready, that it lives, and that it stops."""

    def __init__(self, address: str = "", watchdog_s: float | None = None, file: Path | None = None) -> None:
        """`address` as in NOTIFY_SOCKET, where `@` begins an abstract one; `watchdog_s` of silence count as a hang.

        `file`, where there is one, is written anew at each sign of life.
        """
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._file = file
        self._watched = watchdog_s is not None
        self._every_s = min(TELL_S, watchdog_s / 3) if watchdog_s else TELL_S
        self._next = 0.0
        self._status = ""
        self._ready = self._stopping = False

    def alive(self, status: str = "") -> None:
        """Give a sign of life. To be called by what has to go on for the process to be well, and as often as it likes.

        A start or a stop is thereby given more time, as it may take as long as a model takes to load or a run to end.
        """
        now = time.monotonic()
        if now < self._next and status == self._status:
            return
        self._next, self._status = now + self._every_s, status
        self._write()
        told = ["WATCHDOG=1"] if self._watched else []
        if self._stopping or not self._ready:
            told.append(f"EXTEND_TIMEOUT_USEC={EXTEND_S * 1_000_000}")
        self._tell(*told, *([f"STATUS={status}"] if status else []))

    def ready(self) -> None:
        """Say, the first time, that it does what it is for."""
        if not self._ready:
            self._ready = True
            self._tell("READY=1")
            self._write()

    def stopping(self) -> None:
        """Say that it ends, as it was asked to."""
        self._stopping = True
        self._tell("STOPPING=1")

    def _tell(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as line:
            line.sendto("\n".join(lines).encode(), self._address)

    def _write(self) -> None:
        if self._file is None:
            return
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            partial.write_text(f"{READY if self._ready else STARTING} {self._status}\n", "utf-8")
            partial.replace(self._file)


def sign_of_life(file: Path) -> tuple[float, str]:
    """Return how many seconds ago a process last wrote its file, and what; raises OSError where it has not."""
    return time.time() - file.stat().st_mtime, file.read_text("utf-8").strip()


@functools.cache
def service_manager(file: Path | None = None) -> ServiceManager:
    """Return this process's service manager, as told by its environment, where no child will find it any more."""
    told = take_service_manager()
    watchdog_us = told.get("WATCHDOG_USEC", "")
    watched = watchdog_us.isdecimal() and told.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return ServiceManager(told.get("NOTIFY_SOCKET", ""), int(watchdog_us) / 1e6 if watched else None, file)
