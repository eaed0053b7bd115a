"""The load generator: one process, raw sockets, a request ready-made and the answer's bytes barely looked at.

python -m bench.load PORT PATH SECONDS CONNECTIONS < BODY
"""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bench.fleet import HOST, ROOT

EXPECTED = b"HTTP/1.1 202"
CHUNK = 65536


class Load(NamedTuple):
    """How many answers came in what time, what the generator itself cost, and how many were no 202."""

    answers: int
    seconds: float
    cpu_s: float
    unexpected: int

    @property
    def per_s(self) -> float:
        return self.answers / self.seconds


def payload(body: Mapping[str, object]) -> bytes:
    """Return a request's body as it is sent."""
    return json.dumps(body).encode()


def post(port: int, path: str, body: bytes, *, seconds: float, connections: int) -> Load:
    """Run the generator as a process of its own, which shares no interpreter with whoever asks."""
    command = [sys.executable, "-m", "bench.load", str(port), path, str(seconds), str(connections)]
    done = subprocess.run(command, input=body, stdout=subprocess.PIPE, check=True, timeout=seconds + 30, cwd=ROOT)
    return Load(*json.loads(done.stdout))


@dataclass(slots=True)
class _Connection:
    sock: socket.socket
    got: bytes = b""


def _run(port: int, path: str, body: bytes, seconds: float, connections: int) -> Load:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    request = head.encode() + body
    selector = selectors.DefaultSelector()
    for _ in range(connections):
        sock = socket.create_connection((HOST, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(sock, selectors.EVENT_READ, _Connection(sock))
        sock.sendall(request)
    answers = unexpected = 0
    began, cpu = time.perf_counter(), time.process_time()
    until = began + seconds
    while (now := time.perf_counter()) < until:
        for key, _ in selector.select(until - now):
            connection: _Connection = key.data
            received = connection.sock.recv(CHUNK)
            if not received:
                raise ConnectionError("the server closed a connection")
            connection.got += received
            if _complete(connection.got):
                answers += 1
                unexpected += not connection.got.startswith(EXPECTED)
                connection.got = b""
                connection.sock.sendall(request)
    return Load(answers, time.perf_counter() - began, time.process_time() - cpu, unexpected)


def _complete(got: bytes) -> bool:
    head, separator, rest = got.partition(b"\r\n\r\n")
    if not separator:
        return False
    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return len(rest) >= int(length)


if __name__ == "__main__":
    port, path, seconds, connections = sys.argv[1:]
    print(json.dumps(_run(int(port), path, sys.stdin.buffer.read(), float(seconds), int(connections))))
