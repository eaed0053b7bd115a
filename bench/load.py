"""The load generator: one process, raw sockets, ready-made requests and the answers' bytes barely looked at.

`python -m bench.load PORT SECONDS CONNECTIONS submits|tasks < BODY` prints what came of it as JSON. It imports nothing
of ours, so that it is there at once.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
WAIT_S = 30
CHUNK = 65536
LATE_S = 20.0

What = Literal["submits", "tasks"]


class Load(NamedTuple):
    """What a generator did: submits, or tasks from submit to end."""

    done: int  # with those under way when the time was up
    in_time: int
    seconds: float
    cpu_s: float  # of the generator itself
    unexpected: int  # answers other than hoped for

    @property
    def per_s(self) -> float:
        return self.in_time / self.seconds


def send(port: int, what: What, body: Mapping[str, object], *, seconds: float, connections: int) -> Load:
    """Keep so many connections busy: with submits, or with a submit and then one status call that waits for its end.

    In a process of its own, which shares no interpreter with whoever asks.
    """
    command = [sys.executable, "-m", "bench.load", str(port), str(seconds), str(connections), what]
    given = json.dumps(body).encode()
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, check=True, timeout=seconds + 60, cwd=ROOT)
    return Load(*json.loads(done.stdout))


@dataclass(slots=True)
class _Connection:
    sock: socket.socket
    got: bytes = b""
    waits: bool = False  # for a task, by a status call


def _run(port: int, seconds: float, connections: int, what: What, body: bytes) -> Load:
    lines = ("POST /api/submit HTTP/1.1", f"Host: {HOST}", "Content-Type: application/json")
    submit = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body
    selector = selectors.DefaultSelector()
    for _ in range(connections):
        sock = socket.create_connection((HOST, port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(sock, selectors.EVENT_READ, _Connection(sock))
        sock.sendall(submit)
    done = in_time = unexpected = 0
    busy = connections
    began, cpu = time.perf_counter(), time.process_time()
    until = began + seconds
    while busy:
        for key, _ in selector.select(LATE_S):
            connection: _Connection = key.data
            received = connection.sock.recv(CHUNK)
            if not received:
                raise ConnectionError("the server closed a connection")
            connection.got += received
            if not _complete(connection.got):
                continue
            good = _good(connection)
            unexpected += not good
            if what == "tasks" and not connection.waits and good:
                connection.waits, request = True, _status(connection.got)
            else:
                done += 1
                connection.waits, request = False, submit
                if time.perf_counter() >= until:
                    busy -= 1
                    continue
                in_time += 1
            connection.got = b""
            connection.sock.sendall(request)
        if time.perf_counter() > until + LATE_S:
            raise TimeoutError(f"{busy} connections still wait for an answer")
    return Load(done, in_time, seconds, time.process_time() - cpu, unexpected)


def _complete(got: bytes) -> bool:
    head, separator, rest = got.partition(b"\r\n\r\n")
    if not separator:
        return False
    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return len(rest) >= int(length)


def _good(connection: _Connection) -> bool:
    if connection.waits:
        return connection.got.startswith(b"HTTP/1.1 200") and b'"status":"succeeded"' in connection.got
    return connection.got.startswith(b"HTTP/1.1 202")


def _status(answer: bytes) -> bytes:
    found = re.search(rb'"status_url": ?"([^"]+)"', answer)
    assert found, answer
    return b"GET %s?wait=%d HTTP/1.1\r\nHost: %s\r\n\r\n" % (found[1], WAIT_S, HOST.encode())


if __name__ == "__main__":
    port, seconds, connections, what = sys.argv[1:]
    chosen: What = "tasks" if what == "tasks" else "submits"
    print(json.dumps(_run(int(port), float(seconds), int(connections), chosen, sys.stdin.buffer.read())))
