from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

import gateway
from gateway.gunicorn_worker import _OneWrite

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
