"""A client's socket that gives up on clients who send or read so slowly that they only hold a connection.

Nginx does so for its clients; this is for those that reach the gateway itself.
"""

from __future__ import annotations

import errno
import time
from typing import Any

HEAD_S = 10.0  # for the head of a request, from its first byte; on a new connection from its opening
BODY_GRACE_S = 10.0  # before a body's rate counts
BODY_RATE = 4096  # bytes a second that a body has to come with
SEND_S = 10.0  # for the client to take anything at all of an answer


class ClientSocket:
    """A gevent socket with those limits. The worker tells it where in a request it is."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._body = False
        self._until: float | None = time.monotonic() + HEAD_S  # None: nothing is due
        self._received = 0

    def expect_body(self) -> None:
        """Take what comes from now on as a request's body."""
        self._body, self._received, self._until = True, 0, time.monotonic() + BODY_GRACE_S

    def expect_head(self) -> None:
        """Take what comes from now on as the next request, which may come at any time."""
        self._body, self._until = False, None

    def recv(self, size: int) -> bytes:
        """Return what has come; raises TimeoutError for a body that is too slow. A slow head counts as a hang-up."""
        left = self._left_s()
        if left is not None and left <= 0:
            return self._give_up()
        self._sock.settimeout(left)
        try:
            data: bytes = self._sock.recv(size)
        except TimeoutError:
            return self._give_up()
        if self._body:
            self._received += len(data)
        elif self._until is None:
            self._until = time.monotonic() + HEAD_S
        return data

    def sendall(self, data: bytes) -> None:
        """Send all of it; raises BrokenPipeError once the client takes nothing more."""
        rest = memoryview(data)
        self._sock.settimeout(SEND_S)
        try:
            while rest:
                rest = rest[self._sock.send(rest) :]
        except TimeoutError:
            raise BrokenPipeError(errno.EPIPE, "the client takes nothing more of its answer") from None

    def sendfile(self, *args: Any, **named: Any) -> int:
        """Send a file as socket.sendfile does; raises BrokenPipeError like sendall."""
        self._sock.settimeout(SEND_S)
        try:
            sent: int = self._sock.sendfile(*args, **named)
        except TimeoutError:
            raise BrokenPipeError(errno.EPIPE, "the client takes nothing more of its answer") from None
        return sent

    def _left_s(self) -> float | None:
        if self._until is None:
            return None
        return self._until + (self._received / BODY_RATE if self._body else 0.0) - time.monotonic()

    def _give_up(self) -> bytes:
        if self._body:
            raise TimeoutError("the body comes too slowly")
        return b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)
