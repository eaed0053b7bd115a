"""The rendered Nginx configuration where things go wrong: gateways that are down, slow or dying; and TLS."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.integration.nginx_edge import assert_problem, free_port, nginx, self_signed, stub_gateway


@pytest.fixture(scope="module")
def gateway() -> Iterator[int]:
    """The stub gateway's port."""
    with stub_gateway() as port:
        yield port


def test_gateway_down(tmp_path: Path) -> None:
    with nginx(tmp_path, free_port()) as edge:
        for answer in (requests.get(f"{edge.url}/health"), requests.post(f"{edge.url}/api/submit", json={})):
            assert_problem(answer, 502, "gateway_unavailable")
            assert answer.headers["Retry-After"] == "5"


def test_gateway_too_slow(gateway: int, tmp_path: Path) -> None:
    with nginx(tmp_path, gateway, edit=("proxy_read_timeout 75s", "proxy_read_timeout 300ms")) as edge:
        events = requests.get(f"{edge.url}/api/tasks/t1/events")  # 0.4 s of silence: not too slow for a stream
        assert events.text.count("event: progress") == 3
        answer = requests.get(f"{edge.url}/api/status/t1?wait=1")
        assert_problem(answer, 504, "gateway_unavailable")
        assert answer.headers["Retry-After"] == "5"


def test_sent_submission_is_not_repeated(gateway: int, tmp_path: Path) -> None:
    """One gateway takes requests and dies without a word: a POST must not travel on to the other, a GET may."""
    taken: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as dying:

        def take() -> None:
            while True:
                try:
                    connection = dying.accept()[0]
                except OSError:
                    return
                with connection:
                    taken.append(connection.recv(65536))

        threading.Thread(target=take, daemon=True).start()
        with nginx(tmp_path, gateway, dying.getsockname()[1], edit=("max_fails=3", "max_fails=0")) as edge:
            sent = [f"once-{n}" for n in range(12)]
            posts = [requests.post(f"{edge.url}/api/submit", headers={"Idempotency-Key": key}) for key in sent]
            gets = [requests.get(f"{edge.url}/echo").status_code for _ in range(12)]
        dying.shutdown(socket.SHUT_RDWR)
    seen = [key for key in requests.get(f"http://127.0.0.1:{gateway}/stub/submitted").json() if key.startswith("once-")]
    lost = [answer for answer in posts if answer.status_code == 502]
    assert 0 < len(lost) < 12 and len(seen) == 12 - len(lost) == len(set(seen))
    assert sum(request.startswith(b"POST") for request in taken) == len(lost)
    assert set(gets) == {200} and any(request.startswith(b"GET") for request in taken)


def test_unreachable_gateway_costs_no_submission(gateway: int, tmp_path: Path) -> None:
    with nginx(tmp_path, gateway, free_port(), edit=("max_fails=3", "max_fails=0")) as edge:
        assert {requests.post(f"{edge.url}/api/submit").status_code for _ in range(12)} == {202}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls(gateway: int, tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path)
    port = free_port()
    with nginx(tmp_path / "run", gateway, tls_cert=cert, tls_key=key, tls_listen=f"127.0.0.1:{port}") as edge:
        moved = requests.post(f"{edge.url}/api/submit?a=b", allow_redirects=False)
        assert (moved.status_code, moved.headers["Location"]) == (308, f"https://127.0.0.1:{port}/api/submit?a=b")
        assert "Strict-Transport-Security" not in moved.headers
        answer = requests.post(f"{edge.url}/echo", data=b"kept", verify=str(cert))
        assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
        headers = answer.json()["headers"]
        assert (headers["X-Forwarded-Proto"], headers["Content-Length"]) == ("https", "4")
        assert_problem(requests.get(f"http://127.0.0.1:{port}/"), 400, "bad_request")

        def handshake(newest: ssl.TLSVersion) -> tuple[str | None, str | None]:
            context = ssl.create_default_context(cafile=str(cert))
            context.set_ciphers("DEFAULT@SECLEVEL=0")  # else the client itself would refuse the old versions
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
            context.set_alpn_protocols(["h2", "http/1.1"])
            plain = socket.create_connection(("127.0.0.1", port))
            with plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                return secure.version(), secure.selected_alpn_protocol()

        assert handshake(ssl.TLSVersion.TLSv1_3) == ("TLSv1.3", "h2")
        assert handshake(ssl.TLSVersion.TLSv1_2) == ("TLSv1.2", "h2")
        with pytest.raises(ssl.SSLError, match="protocol version"):
            handshake(ssl.TLSVersion.TLSv1_1)
