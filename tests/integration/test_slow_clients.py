"""Two hundred clients that hold what they can for as long as they can, beside one that only wants its answers."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from common.settings import load_settings
from tests.integration.hardened import Front, front
from tests.servers import RedisServer

pytestmark = pytest.mark.alone
SLOW = 200
ASKED = 150
DRIP_S = 1.0
CUT_WITHIN_S = 12.0  # 10, and what a busy machine adds
HEAD = b"POST /api/submit HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODIES_AT_ONCE = 32  # of one address, at the Nginx of these tests


@pytest.fixture(scope="module")
def whole(redis_session: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    redis_session.flush()
    folder: Path = tmp_path_factory.mktemp("slow")
    settings = load_settings({"redis_url": redis_session.url, "data_dir": folder, "models": ("simulated",)})
    with front(settings, folder, bodies=BODIES_AT_ONCE) as running:
        yield running


class Drip:
    """Connections that each send a start, and then one byte after the other, until they are cut off."""

    def __init__(self, port: int, start: bytes, drop: bytes) -> None:
        self.lasted: list[float] = []
        self.heard: list[bytes] = []
        self._drop = drop
        self._socks = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(SLOW)]
        self._began = time.monotonic()
        for sock in self._socks:
            sock.sendall(start)
            sock.setblocking(False)
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._thread.join(CUT_WITHIN_S + 5)
        for sock in self._socks:
            sock.close()

    def _go_on(self) -> None:
        while self._socks and time.monotonic() - self._began < CUT_WITHIN_S:
            time.sleep(DRIP_S)
            self._socks = [sock for sock in self._socks if self._lives(sock)]

    def _lives(self, sock: socket.socket) -> bool:
        try:
            heard = sock.recv(4096)
        except BlockingIOError:
            try:
                sock.send(self._drop)
                return True
            except OSError:
                heard = b""
        except OSError:
            heard = b""
        sock.close()
        self.heard.append(heard)
        self.lasted.append(time.monotonic() - self._began)
        return False


def p99s_ms(urls: Sequence[str], for_s: float) -> list[float]:
    """How long all but one in a hundred answers of each server take, when it is asked 150 times spread over a time."""
    took: dict[str, list[float]] = {url: [] for url in urls}
    began = time.monotonic()
    with requests.Session() as session:
        for turn in range(ASKED):
            time.sleep(max(0.0, began + turn * for_s / ASKED - time.monotonic()))
            for url in urls:
                asked = time.perf_counter()
                assert session.get(f"{url}/api/templates", timeout=10).ok
                took[url].append((time.perf_counter() - asked) * 1000)
    return [sorted(each)[int(ASKED * 0.99) - 1] for each in took.values()]


class Deaf:
    """A client that asks on and on, and reads nothing."""

    def __init__(self, port: int) -> None:
        self.lasted = math.inf
        self._port = port
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._thread.join(CUT_WITHIN_S + 10)

    def _ask(self) -> None:
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: identity\r\n\r\n"
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(CUT_WITHIN_S + 5)
            sock.connect(("127.0.0.1", self._port))
            began = time.monotonic()
            try:
                while True:
                    sock.sendall(ask * 50)
            except (ConnectionResetError, BrokenPipeError):
                self.lasted = time.monotonic() - began


@dataclass
class Siege:
    """Every attack at once, by server (0: the gateway, 1: Nginx), and what others felt of it."""

    heads: list[Drip]
    bodies: list[Drip]
    deaf: list[Deaf]
    before_ms: list[float]
    during_ms: list[float]


@pytest.fixture(scope="module")
def siege(whole: Front) -> Siege:
    urls = (whole.gateway.url, whole.edge.url)
    before = p99s_ms(urls, 4.0)
    heads = [Drip(port, HEAD + b"X-A: ", b"a") for port in whole.ports]
    bodies = [Drip(port, HEAD + b"Content-Length: 5000\r\n\r\n{", b" ") for port in whole.ports]
    deaf = [Deaf(port) for port in whole.ports]
    during = p99s_ms(urls, CUT_WITHIN_S)  # until the last of them has been cut off
    for one in (*heads, *bodies, *deaf):
        one.close()
    return Siege(heads, bodies, deaf, before, during)


SERVERS = pytest.mark.parametrize("server", [0, 1], ids=["gateway", "nginx"])


@SERVERS
def test_others_hardly_notice_slow_clients(siege: Siege, server: int) -> None:
    # goal: twice; the rest is what 150 answers tell of a hundredth of them
    print(f"p99 {siege.before_ms[server]:.1f} ms before, {siege.during_ms[server]:.1f} ms during")
    assert siege.during_ms[server] < 2 * siege.before_ms[server] + 25, (siege.before_ms, siege.during_ms)


@SERVERS
def test_slow_heads_are_cut_off(siege: Siege, server: int) -> None:
    assert len(siege.heads[server].lasted) == SLOW and max(siege.heads[server].lasted) < CUT_WITHIN_S


def test_slow_bodies_are_cut_off_by_the_gateway(siege: Siege) -> None:
    drip = siege.bodies[0]
    assert len(drip.lasted) == SLOW and max(drip.lasted) < CUT_WITHIN_S
    assert {heard[:13] for heard in drip.heard} == {b"HTTP/1.1 408 "}
    assert all(b'"code":"request_timeout"' in heard for heard in drip.heard)


def test_slow_bodies_wait_in_nginx_so_many_of_an_address(siege: Siege) -> None:
    """They never reach a gateway; all but some are refused at once. Silent ones are cut off: see test_nginx.py."""
    refused = [heard for heard in siege.bodies[1].heard if heard.startswith(b"HTTP/1.1 429 ")]
    assert len(refused) == SLOW - BODIES_AT_ONCE


@SERVERS
def test_who_does_not_read_is_cut_off(siege: Siege, server: int) -> None:
    """Answers pile up in the kernel, then nothing moves; that is waited for no longer than 10 s."""
    assert siege.deaf[server].lasted < CUT_WITHIN_S + 3


def test_a_slow_body_is_taken_where_it_keeps_its_rate(whole: Front) -> None:
    body = b'{"prompt": "x", "model": "simulated"' + b" " * 60_000 + b"}"
    with socket.create_connection(("127.0.0.1", whole.gateway.port), timeout=10) as sock:
        sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
        for at in range(0, len(body), 30_000):
            time.sleep(0.5)
            sock.sendall(body[at : at + 30_000])
        assert sock.recv(4096).startswith(b"HTTP/1.1 202 ")
