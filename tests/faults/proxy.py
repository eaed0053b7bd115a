"""A TCP proxy before Redis that loses replies, takes its time, or is cut: what a bad network does, on command."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Self

CONNECTIONS = 256
CHUNK = 1 << 16


class Proxy:
    """Listens on a port of loopback and passes on to another one. Two threads a connection."""

    def __init__(self, port: int) -> None:
        """`port` is where Redis listens."""
        self._upstream = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.delay_s = 0.0  # before each piece of a reply
        self.lost = 0  # replies
        self._cut = False
        self._to_lose: dict[bytes, int] = {}
        self._lock = threading.Lock()
        self._pairs: set[_Pair] = set()

    def lose(self, marker: str, count: int) -> None:
        """The next `count` commands that contain this text reach Redis; their connections end without the reply."""
        with self._lock:
            self._to_lose[marker.encode()] = self._to_lose.get(marker.encode(), 0) + count

    @property
    def to_lose(self) -> int:
        """How many replies are still to be lost."""
        return sum(self._to_lose.values())

    def cut(self) -> None:
        """End every connection, and from now on each new one at once."""
        self._cut = True
        self._end_all()

    def mend(self) -> None:
        self._cut = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cut = True
        self._listener.close()
        self._end_all()

    def _end_all(self) -> None:
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._cut or len(self._pairs) >= CONNECTIONS:
                client.close()
                continue
            try:
                pair = _Pair(client, socket.create_connection(self._upstream, timeout=1.0))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._pairs.add(pair)
            for pump in (self._ask, self._answer):
                threading.Thread(target=pump, args=(pair,), name="proxy", daemon=True).start()

    def _ask(self, pair: _Pair) -> None:
        with pair.until_closed():
            while piece := pair.client.recv(CHUNK):
                pair.asked += piece
                if self._take(pair.asked):
                    pair.losing = True  # before Redis can have answered
                pair.server.sendall(piece)

    def _answer(self, pair: _Pair) -> None:
        with pair.until_closed():
            while piece := pair.server.recv(CHUNK):
                if pair.losing:
                    with self._lock:
                        self.lost += 1
                    break
                if self.delay_s:
                    time.sleep(self.delay_s)
                pair.asked = b""  # before the client can ask again
                pair.client.sendall(piece)
        with self._lock:
            self._pairs.discard(pair)

    def _take(self, seen: bytes) -> bool:
        with self._lock:
            for marker, count in self._to_lose.items():
                if count and marker in seen:
                    self._to_lose[marker] = count - 1
                    return True
        return False


class _Pair:
    """A client's connection and ours to Redis for it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.server.settimeout(None)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.asked = b""  # of the command that has not been answered
        self.losing = False

    @contextlib.contextmanager
    def until_closed(self) -> Iterator[None]:
        try:
            with contextlib.suppress(OSError):
                yield
        finally:
            self.close()

    def close(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
