"""A crowd of clients in one lean process: many follow tasks by server-sent events, others poll them impatiently.

`python -m bench.crowd PORT LISTENERS POLLERS POLLS_PER_S tagged|plain` reads lines: `task ID` is one more to look at,
`go` starts the polls, `stop` ends it all. It prints `ready` once every listener has heard something, and in the end
what it saw, as JSON. Whoever has seen a task's end goes on to the next. It imports nothing of ours, and looks at bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import socket
import sys
import time
from collections import Counter, deque

HOST = "127.0.0.1"
CHUNK = 65536
COMING = 64  # listeners at a time that have not been answered yet
TICK_S = 0.002

ENDED = b"0\r\n\r\n"
ETAG = re.compile(rb"\r\nETag: ([^\r]+)", re.IGNORECASE)
LENGTH = re.compile(rb"\r\nContent-Length: (\d+)", re.IGNORECASE)
FINAL = re.compile(rb'"status":"(?:succeeded|failed|canceled|expired)"')


class Crowd:
    """All clients, on one epoll."""

    def __init__(self, port: int, listeners: int, pollers: int, per_s: float, *, tagged: bool) -> None:
        self.port, self.per_s, self.tagged = port, per_s, tagged
        self.seen: Counter[str] = Counter()
        self.late_ms: list[float] = []
        self._input = b""
        self._tasks: deque[bytes] = deque()  # that have not ended
        self._epoll = select.epoll()
        self._listeners: dict[int, Listener] = {}
        self._pollers: dict[int, Poller] = {}
        self._missing = [Listener] * listeners + [Poller] * pollers
        self._waiting = 0
        self._parked: deque[Listener] = deque()  # that have nothing to follow yet
        self._free: deque[Poller] = deque()
        self._began: float | None = None
        self._ended = False
        self._told = False

    def run(self) -> None:
        """Serve until told to stop."""
        os.set_blocking(0, False)
        self._epoll.register(0, select.EPOLLIN)
        while not self._ended:
            while self._tasks and self._waiting < COMING and (self._parked or self._missing):
                self._send_one()
            busy = self._began is not None or self._missing or self._parked
            for fd, _ in self._epoll.poll(TICK_S if busy else 1.0):
                if fd == 0:
                    self._obey()
                elif (listener := self._listeners.get(fd)) is not None:
                    self._hear(listener)
                else:
                    self._answered(self._pollers[fd])
            if not self._missing and not self._waiting and not self._told:
                self._told = True
                print("ready", flush=True)
            if self._began is not None:
                self._poll(time.monotonic())

    def next_task(self) -> bytes:
        """Return the task that the next client looks at, or nothing when all have ended."""
        self._tasks.rotate(-1)
        return self._tasks[0] if self._tasks else b""

    def _over(self, task: bytes) -> None:
        with contextlib.suppress(ValueError):
            self._tasks.remove(task)

    def _send_one(self) -> None:
        if self._parked:
            self._parked.popleft().follow(self.next_task())
            self._waiting += 1
            return
        client = self._missing.pop()(self.port, self)
        self._epoll.register(client.sock, select.EPOLLIN)
        if isinstance(client, Listener):
            self._waiting += 1
            self._listeners[client.sock.fileno()] = client
        else:
            self._pollers[client.sock.fileno()] = client
            self._free.append(client)

    def _obey(self) -> None:
        read = os.read(0, CHUNK)
        *lines, self._input = (self._input + read).split(b"\n")
        for line in lines if read else [b"stop"]:  # nothing: whoever started us is gone
            if line.startswith(b"task "):
                self._tasks.append(line[5:])
            elif line == b"go":
                self._began, self._sent = time.monotonic(), 0
                self.seen.clear()
            elif line == b"stop":
                self._ended = True

    def _hear(self, listener: Listener) -> None:
        data = listener.sock.recv(CHUNK)
        if not data:
            raise ConnectionError("the gateway closed a stream")
        if not listener.heard:
            listener.heard = True
            self._waiting -= 1
        self.seen["events"] += data.count(b"event: ")
        if data.endswith(ENDED):
            self.seen["streams ended"] += 1
            self._over(listener.task)
            self._parked.append(listener)

    def _poll(self, now: float) -> None:
        assert self._began is not None
        due = int((now - self._began) * self.per_s) - self._sent
        for _ in range(min(due, len(self._free))):
            self._free.popleft().ask(now, tagged=self.tagged)
            self._sent += 1

    def _answered(self, poller: Poller) -> None:
        status = poller.receive()
        if status:
            self.seen[f"polls {status}"] += 1
            self.late_ms.append((time.monotonic() - poller.asked) * 1000)
            if poller.final:
                self._over(poller.task)
                poller.take(self.next_task() or poller.task)
            self._free.append(poller)


class Listener:
    """Follows one task after the other on one connection."""

    __slots__ = ("heard", "sock", "task")

    def __init__(self, port: int, crowd: Crowd) -> None:
        self.sock = _connection(port)
        self.follow(crowd.next_task())

    def follow(self, task: bytes) -> None:
        self.task, self.heard = task, False
        self.sock.sendall(
            b"GET /api/tasks/%s/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n" % task
        )


class Poller:
    """Asks for one task until it is final, and then for the next."""

    __slots__ = ("asked", "etag", "final", "got", "sock", "task")

    def __init__(self, port: int, crowd: Crowd) -> None:
        self.sock = _connection(port)
        self.got = b""
        self.asked = 0.0
        self.take(crowd.next_task())

    def take(self, task: bytes) -> None:
        self.task, self.etag, self.final = task, b"", False

    def ask(self, now: float, *, tagged: bool) -> None:
        known = b"If-None-Match: %s\r\n" % self.etag if tagged and self.etag else b""
        self.asked = now
        self.sock.sendall(b"GET /api/status/%s HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % (self.task, known))

    def receive(self) -> str:
        """Return the status of the answer, or nothing while there is more of it to come."""
        self.got += self.sock.recv(CHUNK)
        head, end, body = self.got.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not end or (length and len(body) < int(length[1])):
            return ""
        self.got = b""
        if body:
            found = ETAG.search(head)
            self.etag, self.final = found[1] if found else b"", FINAL.search(body) is not None
        return head[9:12].decode()


def _connection(port: int) -> socket.socket:
    sock = socket.create_connection((HOST, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def main(port: str, listeners: str, pollers: str, per_s: str, how: str) -> None:
    """Be the crowd; print what it saw."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    crowd = Crowd(int(port), int(listeners), int(pollers), float(per_s), tagged=how == "tagged")
    crowd.run()
    late = sorted(crowd.late_ms) or [0.0]
    print(json.dumps({
        **crowd.seen, "poll p50 ms": late[len(late) // 2], "poll p99 ms": late[len(late) * 99 // 100],
        "cpu s": time.process_time(),
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
