"""Bytes to a port as they are, and what comes back: for requests that no client library would send."""

from __future__ import annotations

import re
import socket
from typing import NamedTuple

QUIET_S = 0.4  # a connection that says nothing for so long waits for the next request


class Heard(NamedTuple):
    """All that a server answered to some bytes, and whether it then closed the connection."""

    text: bytes
    closed: bool

    @property
    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", self.text)]


def say(port: int, data: bytes, quiet_s: float = QUIET_S) -> Heard:
    """Send bytes on a new connection of loopback, and listen until it is closed or quiet."""
    heard = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.settimeout(quiet_s)
        try:
            sock.sendall(data)
            while got := sock.recv(65536):
                heard += got
        except TimeoutError:
            return Heard(heard, False)
        except ConnectionError:
            pass
        return Heard(heard, True)
