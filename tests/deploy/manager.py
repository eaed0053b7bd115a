"""The other end of sd_notify: a datagram socket that hears what a service tells its manager, and who says so."""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

from tests.servers import eventually

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Told(NamedTuple):
    """One line of a message, who sent it and when (monotonic)."""

    line: str
    pid: int
    at: float


class Manager:
    """Listens at `address` while the `with` block lasts."""

    def __init__(self, folder: Path | None = None) -> None:
        """In the abstract namespace, or in a folder."""
        self.address = f"@zfleet-test-{secrets.token_hex(8)}" if folder is None else str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._heard: list[Told] = []

    def environment(self, watchdog_s: float | None = None) -> dict[str, str]:
        """What systemd gives a service of Type=notify."""
        watchdog = {} if watchdog_s is None else {"WATCHDOG_USEC": str(round(watchdog_s * 1e6))}
        return {"NOTIFY_SOCKET": self.address, **watchdog}

    def heard(self, line: str) -> list[Told]:
        """All that was told and begins so."""
        return [told for told in list(self._heard) if told.line.startswith(line)]

    def await_line(self, line: str, *, within_s: float = 30.0) -> Told:
        """Wait until something that begins so was told, and return the first of it."""
        eventually(lambda: self.heard(line), within_s=within_s)
        return self.heard(line)[0]

    def more(self, line: str) -> Callable[[], bool]:
        """Return what tells whether something that begins so was told since now."""
        before = len(self.heard(line))
        return lambda: len(self.heard(line)) > before

    def __enter__(self) -> Self:
        self._socket.bind("\0" + self.address[1:] if self.address.startswith("@") else self.address)
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _listen(self) -> None:
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
            except OSError:
                return
            if not data:
                return
            pid = _CREDENTIALS.unpack(ancillary[0][2])[0]
            self._heard += [Told(line, pid, time.monotonic()) for line in data.decode().split("\n")]
