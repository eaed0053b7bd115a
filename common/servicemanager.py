"""What a process tells systemd, its service manager, by sd_notify(3): NAME=value lines in a datagram.

Without a manager that listens it is silence, and one that does not read holds up nobody.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time

from common.settings import take_service_manager

TELL_S = 5.0  # at the longest between two signs of life, whatever the watchdog allows
EXTEND_S = 30  # a start or a stop may go on this long after each sign of life


class ServiceManager:
    """One process's line to its manager, which it tells that it is ready, that it lives, and that it stops."""

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        """`address` as in NOTIFY_SOCKET, where `@` begins an abstract one; `watchdog_s` of silence count as a hang."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
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
        if not self._address or (now < self._next and status == self._status):
            return
        self._next, self._status = now + self._every_s, status
        told = ["WATCHDOG=1"] if self._watched else []
        if self._stopping or not self._ready:
            told.append(f"EXTEND_TIMEOUT_USEC={EXTEND_S * 1_000_000}")
        self._tell(*told, *([f"STATUS={status}"] if status else []))

    def ready(self) -> None:
        """Say, the first time, that it does what it is for."""
        if not self._ready:
            self._ready = True
            self._tell("READY=1")

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


@functools.cache
def service_manager() -> ServiceManager:
    """Return this process's service manager, as told by its environment, where no child will find it any more."""
    told = take_service_manager()
    watchdog_us = told.get("WATCHDOG_USEC", "")
    watched = watchdog_us.isdecimal() and told.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return ServiceManager(told.get("NOTIFY_SOCKET", ""), int(watchdog_us) / 1e6 if watched else None)
