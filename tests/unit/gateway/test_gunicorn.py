from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]
import pytest

import gateway
from gateway.gunicorn_worker import IN_TIME_S, _OneWrite, _Turns

CONF = str(Path(gateway.__file__).parent / "gunicorn_conf.py")


def configured(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    for name, value in environment.items():
        monkeypatch.setenv(f"ZFLEET_{name}", value)
    return runpy.run_path(CONF)


def test_gunicorn_is_set_up_by_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    conf = configured(monkeypatch, HOST="0.0.0.0", PORT="9000", GATEWAY_WORKERS="3", GATEWAY_CONNECTIONS="77")
    assert (conf["bind"], conf["workers"], conf["worker_connections"]) == ("0.0.0.0:9000", 3, 77)
    assert conf["wsgi_app"] == "gateway.wsgi:app"
    assert conf["worker_class"] == "gateway.gunicorn_worker.Worker"
    assert conf["keepalive"] > 60  # what Nginx is set to
    assert conf["accesslog"] is None


def test_an_ipv6_address_is_bracketed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured(monkeypatch, HOST="::1", PORT="9000")["bind"] == "[::1]:9000"


class Sock:
    def __init__(self) -> None:
        self.calls: list[object] = []

    def sendall(self, data: bytes) -> None:
        self.calls.append(data)

    def sendfile(self, name: str) -> None:
        self.calls.append(name)


def test_head_and_first_body_go_together_and_the_rest_as_it_comes() -> None:
    sock = Sock()
    one = _OneWrite(sock)
    one.sendall(b"head ")
    assert sock.calls == []
    one.sendall(b"body ")
    one.sendall(b"more")
    one.flush()
    assert sock.calls == [b"head body ", b"more"]


def test_a_head_alone_goes_with_the_flush() -> None:
    sock = Sock()
    one = _OneWrite(sock)
    one.sendall(b"head")
    one.flush()
    one.flush()
    assert sock.calls == [b"head"]


def test_the_head_goes_before_anything_else_that_is_done_to_the_socket() -> None:
    sock = Sock()
    one = _OneWrite(sock)
    one.sendall(b"head")
    one.sendfile("file")
    assert sock.calls == [b"head", "file"]


def test_requests_begin_at_once_while_the_loop_is_in_time() -> None:
    turns = _Turns()
    gevent.sleep(0.001)
    turns.take()
    assert not turns._line and not turns._calling


def test_a_burst_begins_a_few_at_a_time_in_order_and_lets_others_through() -> None:
    turns = _Turns()
    begun: list[int] = []
    rounds: list[int] = []

    def request(number: int) -> None:
        turns.take()
        begun.append(number)
        until = time.perf_counter() + IN_TIME_S / 10  # as a request that reads keeps the loop busy
        while time.perf_counter() < until:
            pass

    def others() -> None:
        while len(begun) < 200:
            rounds.append(len(begun))
            gevent.sleep(0.0005)

    every = [gevent.spawn(request, number) for number in range(200)] + [gevent.spawn(others)]
    gevent.joinall(every, timeout=20, raise_error=True)
    assert begun == list(range(200))
    assert len(rounds) > 10, "what does not stand in line goes on meanwhile"
    gevent.sleep(0.01)
    assert not turns._calling
