"""The rendered Nginx configuration, driven for real: Nginx in front of a small gunicorn, all on loopback."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests

from tests.integration.nginx_edge import Edge, assert_problem, nginx, stub_gateway

WEBP = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def gateway() -> Iterator[int]:
    """The stub gateway's port."""
    with stub_gateway() as port:
        yield port


@pytest.fixture(scope="module")
def edge(gateway: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """Nginx in front of the stub gateway, with a finished image in a results folder whose path has spaces."""
    with nginx(tmp_path_factory.mktemp("edge"), gateway) as running_edge:
        (running_edge.results / "t1").mkdir()
        (running_edge.results / "t1" / "0.webp").write_bytes(WEBP)
        yield running_edge


# ---- limits


def test_rate_limit_counts_submissions_only(gateway: int, tmp_path: Path) -> None:
    with nginx(tmp_path, gateway, rate="3r/m", burst=2) as edge:
        answers = [
            requests.post(f"{edge.url}{path}", json={}) for path in ["/api/submit", "/v1/images/generations"] * 3
        ]
        assert [answer.status_code for answer in answers] == [202] * 3 + [429] * 3
        for answer in answers[3:]:
            assert_problem(answer, 429, "rate_limited")
            assert answer.headers["Retry-After"] == "20"  # one request every 60 / 3 seconds
        entry = edge.log_of(answers[-1].headers["X-Request-ID"])
        assert (entry["method"], entry["path"], entry["status"]) == ("POST", "/v1/images/generations", 429)
        spoofed = requests.post(
            f"{edge.url}/api/submit", headers={"X-Forwarded-For": "8.8.8.8", "X-Real-IP": "8.8.8.8"}
        )
        assert spoofed.status_code == 429
        assert {requests.post(f"{edge.url}/api/cancel/t{n}").status_code for n in range(9)} == {202}
        assert {requests.get(f"{edge.url}/api/status/t{n}").status_code for n in range(9)} == {200}


def test_body_limit(edge: Edge, gateway: int) -> None:
    limit = 100 * 1024 * 1024
    assert requests.post(f"{edge.url}/api/submit", data=bytes(limit)).json()["length"] == limit
    before = requests.get(f"http://127.0.0.1:{gateway}/stub/submitted").json()
    mebibytes = [bytes(1024 * 1024)] * 101
    for headers, body in (
        ({"Content-Length": str(limit + 1)}, None),
        ({"Transfer-Encoding": "chunked"}, iter(mebibytes)),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", edge.port, timeout=20)
        connection.request("POST", "/api/submit", body, headers, encode_chunked=body is not None)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Content-Type"]) == (413, "application/problem+json")
        problem = json.loads(answer.read())
        assert (problem["code"], problem["status"], problem["title"]) == ("body_too_large", 413, "Content Too Large")
        connection.close()
    assert requests.get(f"http://127.0.0.1:{gateway}/stub/submitted").json() == before


def test_slow_clients_are_cut_off(edge: Edge) -> None:
    started = time.monotonic()
    connections = [socket.create_connection(("127.0.0.1", edge.port), timeout=20) for _ in range(2)]
    connections[0].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
    connections[1].sendall(b"POST /api/submit HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
    for connection in connections:
        with connection, contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        assert 9 < time.monotonic() - started < 18


# ---- what passes through


def test_connections_to_the_gateway_are_reused(edge: Edge) -> None:
    ports = {requests.get(f"{edge.url}/echo").json()["port"] for _ in range(20)}
    assert len(ports) == 1


def test_long_poll_is_held(edge: Edge) -> None:
    started = time.monotonic()
    assert requests.get(f"{edge.url}/api/status/t1?wait=3").json()["status"] == "succeeded"
    assert 3 <= time.monotonic() - started < 15
    text = (edge.run / "nginx.conf").read_text()
    assert "    proxy_read_timeout 75s;" in text and text.count("proxy_buffering off;") == 1


@pytest.mark.parametrize("path", ["/api/tasks/t1/events", "/dialect/t1/stream"])
def test_events_leave_at_once(edge: Edge, path: str) -> None:
    with requests.get(f"{edge.url}{path}", stream=True) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        lags = [time.time() - float(line[6:]) for line in answer.iter_lines(chunk_size=1) if line.startswith(b"data: ")]
    assert len(lags) == 3 and max(lags) < 0.4


def test_headers_of_the_client(edge: Edge) -> None:
    sent = {
        "Authorization": "Bearer zf_key",
        "Idempotency-Key": "once",
        "X-Forwarded-For": "8.8.8.8",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Port": "1",
        "X-Forwarded-Prefix": "/evil",
        "X_Forwarded_For": "8.8.8.8",
        "X-Real-IP": "8.8.8.8",
        "Forwarded": "for=8.8.8.8",
        "Upgrade": "h2c",
        "Connection": "Upgrade",
    }
    got = requests.get(f"{edge.url}/echo", headers=sent).json()["headers"]
    host = f"127.0.0.1:{edge.port}"
    assert (got["Authorization"], got["Idempotency-Key"], got["Host"]) == ("Bearer zf_key", "once", host)
    assert (got["X-Forwarded-For"], got["X-Forwarded-Proto"], got["X-Forwarded-Host"]) == ("127.0.0.1", "http", host)
    assert got["X-Real-Ip"] == "127.0.0.1"
    assert not {"Forwarded", "X-Forwarded-Port", "X-Forwarded-Prefix", "Upgrade", "Connection"} & set(got)
    socket_headers = requests.get(f"{edge.url}/ws", headers={"Upgrade": "websocket", "Connection": "Upgrade"}).json()
    assert socket_headers["headers"]["Upgrade"] == "websocket"


def test_request_id(edge: Edge) -> None:
    for given, kept in [
        ("a.b_C-9" * 9, True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("a b", False),
        ('a"b', False),
        ("", False),
    ]:
        answer = requests.get(f"{edge.url}/echo", headers={"X-Request-ID": given})
        at_gateway = answer.json()["headers"]["X-Request-Id"]
        assert answer.headers["X-Request-ID"] == at_gateway  # one header: the gateway's own was replaced
        assert at_gateway == given if kept else len(at_gateway) == 32 and at_gateway.isalnum()
    assert len({requests.get(f"{edge.url}/nowhere").headers["X-Request-ID"] for _ in range(3)}) == 3


def test_json_is_compressed(edge: Edge) -> None:
    assert requests.get(f"{edge.url}/big").headers["Content-Encoding"] == "gzip"
    plain = requests.get(f"{edge.url}/big", headers={"Accept-Encoding": "identity"})
    assert "Content-Encoding" not in plain.headers and plain.headers["Vary"] == "Accept-Encoding"
    assert "Content-Encoding" not in requests.get(f"{edge.url}/view/t1/0.webp").headers


def test_access_log(edge: Edge) -> None:
    secrets = {"Authorization": "Bearer zf_secret", "Idempotency-Key": "zf_secret", "Cookie": "k=zf_secret"}
    for n, path in enumerate(
        ["/api/submit?key=zf_secret", '/a%22b"\\c?zf_secret', "/caf\xe9?zf_secret", "/view/t1/0.webp"]
    ):
        lines = [f"{name}: {value}" for name, value in secrets.items()] + [
            f"X-Request-ID: log-{n}",
            "Connection: close",
        ]
        body = '{"prompt": "zf_secret"}'
        lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *lines, "", body]
        edge.raw("\r\n".join(lines).encode("latin-1"))
    requests.get(f"{edge.url}/api/status/t1?wait=1.1", headers={"X-Request-ID": "log-slow"})
    entries = [edge.log_of(f"log-{name}") for name in (0, 1, 2, "slow")]
    assert [entry["path"] for entry in entries] == ["/api/submit", '/a%22b"\\c', "-", "/api/status/t1"]
    first, slow = entries[0], entries[-1]
    assert (first["method"], first["status"], first["client"]) == ("POST", 202, "127.0.0.1")
    assert first["bytes"] > 100 and (first["role"], first["event"]) == ("nginx", "request")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", first["time"])
    assert abs(datetime.fromisoformat(first["time"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert 1100 <= slow["duration_ms"] < 3000 and 1.1 <= float(slow["upstream_seconds"]) < 3
    assert "zf_secret" not in (edge.run / "access.log").read_text()


# ---- images


def test_image_is_served_from_the_results(edge: Edge) -> None:
    answer = requests.get(f"{edge.url}/view/t1/0.webp")
    assert (answer.status_code, answer.content) == (200, WEBP)
    assert answer.headers["Content-Type"] == "image/webp"
    assert answer.headers["Cache-Control"] == "private, max-age=60, immutable"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    part = requests.get(f"{edge.url}/view/t1/0.webp", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, WEBP[10:20])
    odd = edge.results / "t1" / "ü 100%?.webp"
    odd.write_bytes(b"odd")
    assert requests.get(f"{edge.url}/view/t1/%C3%BC%20100%25%3F.webp").content == b"odd"


def test_results_cannot_be_left(edge: Edge) -> None:
    outside = edge.run / "outside.webp"
    outside.write_text("secret")
    (edge.results / "t1" / "link.webp").symlink_to(outside)
    (edge.results / "linked").symlink_to(edge.run)
    for at in (
        "/_results/t1/none.webp",
        "/_results/t1/link.webp",
        "/_results/linked/outside.webp",
        "/_results/../outside.webp",
        "/_results/%2e%2e/outside.webp",
        "/_results/t1/..%2f..%2foutside.webp",
        "/_results/t1/",
        "/_results/t1",
        "/_results/",
    ):
        answer = requests.get(f"{edge.url}/view/x", params={"at": at}, allow_redirects=False)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), at
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert "no-store" in answer.headers["Cache-Control"] and "secret" not in answer.text


def test_results_are_not_reachable_from_outside(edge: Edge) -> None:
    assert_problem(requests.get(f"{edge.url}/_results/t1/0.webp"), 404, "not_found")
    for path in ("/_results/t1/0.webp", "//_results/t1/0.webp", "/%5fresults/t1/0.webp", "/x/../_results/t1/0.webp"):
        assert edge.get_raw(path).startswith(b"HTTP/1.1 404 "), path
    for path in (
        "/_results../outside.webp",
        "/_results%2ft1/0.webp/../../../../etc/passwd",
        "/_results/../../nginx.conf",
    ):
        assert edge.get_raw(path)[:13] in (b"HTTP/1.1 404 ", b"HTTP/1.1 400 "), path
    assert_problem(requests.get(f"{edge.url}/_problem"), 404, "not_found")


# ---- answers that are not the gateway's, and those that are


def test_malformed_request_is_a_problem_too(edge: Edge) -> None:
    for request, status in ((b"GE@T / HTTP/1.1\r\n\r\n", 400), (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414)):
        head, _, body = edge.raw(request).partition(b"\r\n\r\n")
        assert b"application/problem+json" in head and json.loads(body)["status"] == status
    assert_problem(requests.get(f"{edge.url}/echo", headers={"X": "a" * 9000}), 400, "bad_request")


def test_gateways_own_failures_pass_unchanged(edge: Edge) -> None:
    for code in (404, 413, 429, 502, 503, 504):
        answer = requests.get(f"{edge.url}/busy/{code}")
        assert (answer.status_code, answer.json()) == (code, {"code": "the_gateways_own"})
        assert (answer.headers["Retry-After"], answer.headers["Cache-Control"]) == ("7", "max-age=1")
