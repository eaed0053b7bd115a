"""A client that keeps one connection to the gateway open and costs little itself."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import threading
from collections.abc import Sequence
from typing import Any

from bench.fleet import HOST, MODEL

WAIT_S = 30
ANSWER_S = WAIT_S + 10.0


class Unexpected(Exception):
    """Raised when an answer is not what a healthy gateway gives; a measurement with such answers is void."""


def body(**fields: object) -> dict[str, object]:
    """Return a submit's body: a tiny picture, so that next to nothing is measured of its encoding."""
    return {"prompt": "a red circle", "model": MODEL, "width": 16, "height": 16, "format": "png", **fields}


class Caller:
    """One keep-alive connection, for one thread. A request is sent in one piece."""

    def __init__(self, port: int, key: str = "") -> None:
        """With an API key each submit has an Idempotency-Key of its own as well."""
        self._key = key
        self._sock = socket.create_connection((HOST, port), timeout=ANSWER_S)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def submit(self, **fields: object) -> str:
        """Hand in a task; returns its id."""
        return str(self._call("POST", "/api/submit", 202, json.dumps(body(**fields)).encode())["task_id"])

    def finished(self, task_id: str) -> dict[str, Any]:
        """Return the status once the task has succeeded, by one call that waits for it."""
        status = self._call("GET", f"/api/status/{task_id}?wait={WAIT_S}", 200)
        if status["status"] != "succeeded":
            raise Unexpected(f"task {task_id} is {status['status']} after {WAIT_S} s: {status['error']}")
        return status

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def _call(self, method: str, path: str, expected: int, payload: bytes = b"") -> dict[str, Any]:
        head = [f"{method} {path} HTTP/1.1", f"Host: {HOST}"]
        if self._key:
            head += [f"Authorization: Bearer {self._key}", f"Idempotency-Key: {secrets.token_hex(8)}"]
        if payload:
            head += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        self._sock.sendall("\r\n".join((*head, "", "")).encode() + payload)
        answer = http.client.HTTPResponse(self._sock, method=method)
        answer.begin()
        text = answer.read()
        if answer.status != expected:
            raise Unexpected(f"{method} {path}: {answer.status} {text[:200]!r}")
        return dict(json.loads(text))


def in_turn(port: int, tasks: int, callers: int) -> None:
    """Have so many callers submit a task each, wait for it and submit the next, until `tasks` are done in all."""
    shares = [tasks // callers + (index < tasks % callers) for index in range(callers)]
    failures: list[BaseException] = []

    def one(share: int) -> None:
        caller = Caller(port)
        try:
            for _ in range(share):
                caller.finished(caller.submit())
        except BaseException as error:
            failures.append(error)
        finally:
            caller.close()

    _together([threading.Thread(target=one, args=(share,)) for share in shares])
    if failures:
        raise failures[0]


def _together(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
