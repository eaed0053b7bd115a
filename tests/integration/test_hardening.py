"""What a hostile client, or a web page in a visitor's browser, may try on Nginx and on the gateway itself."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import product

import pytest
import requests

from common.settings import load_settings
from gateway.docs import POLICY
from gateway.requestlog import PROTECTION
from tests.integration.hardened import Front, front
from tests.integration.nginx_edge import assert_problem
from tests.integration.raw_http import say
from tests.servers import RedisServer

SUBMIT = {"prompt": "a red circle", "model": "simulated"}


@pytest.fixture(scope="module")
def whole(redis_session: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    redis_session.flush()
    folder = tmp_path_factory.mktemp("hardened")
    settings = load_settings({"redis_url": redis_session.url, "data_dir": folder, "models": ("simulated",)})
    with front(settings, folder) as running:
        yield running


# ---- request smuggling

HIDDEN = b"GET /api/templates HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: smuggled\r\n\r\n"
CHUNKS = b"0\r\n\r\n" + HIDDEN
LENGTH = b"Content-Length: %d" % len(CHUNKS)
CHUNKED = b"Transfer-Encoding: chunked"


def post(*headers: bytes, body: bytes = CHUNKS, version: bytes = b"1.1", line_end: bytes = b"\r\n") -> bytes:
    head = (b"POST /api/submit HTTP/" + version, b"Host: localhost", b"Content-Type: application/json", *headers)
    return line_end.join((*head, b"", b"")) + body


AMBIGUOUS = {
    "cl-te": post(LENGTH, CHUNKED),
    "te-cl": post(CHUNKED, LENGTH),
    "te-te": post(CHUNKED, CHUNKED),
    "te-identity": post(CHUNKED, b"Transfer-Encoding: identity"),
    "te-list-of-two": post(b"Transfer-Encoding: chunked, chunked"),
    "te-identity-chunked": post(b"Transfer-Encoding: identity, chunked", LENGTH),
    "te-gzip-chunked": post(b"Transfer-Encoding: gzip, chunked", LENGTH),
    "te-xchunked": post(b"Transfer-Encoding: xchunked", LENGTH),
    "te-quoted": post(b'Transfer-Encoding: "chunked"', LENGTH),
    "te-space-before-colon": post(b"Transfer-Encoding : chunked", LENGTH),
    "te-space-before-name": post(b"X-A: b", b" Transfer-Encoding: chunked", LENGTH),
    "te-tab": post(b"Transfer-Encoding:\tchunked", LENGTH),
    "te-vertical-tab": post(b"Transfer-Encoding:\x0bchunked", LENGTH),
    "te-null": post(b"Transfer-Encoding: chunked\x00", LENGTH),
    "te-capitals": post(b"TRANSFER-ENCODING: CHUNKED", LENGTH),
    "te-empty": post(b"Transfer-Encoding:", LENGTH),
    "te-folded": post(b"Transfer-Encoding:", b" chunked", LENGTH),
    "te-in-http-1.0": post(CHUNKED, version=b"1.0"),
    "cl-cl": post(b"Content-Length: 0", LENGTH),
    "cl-cl-alike": post(LENGTH, LENGTH),
    "cl-list": post(b"Content-Length: 0, 9"),
    "cl-plus": post(b"Content-Length: +5"),
    "cl-minus": post(b"Content-Length: -5"),
    "cl-hex": post(b"Content-Length: 0x5"),
    "cl-space-inside": post(b"Content-Length: 1 0"),
    "cl-underscore": post(b"Content-Length: 1_0"),
    "cl-superscript": post(b"Content-Length: \xb2"),
    "cl-space-before-colon": post(b"Content-Length : 5"),
    "cl-empty": post(b"Content-Length:"),
    "folded": post(b"X-A: b", b" c", b"Content-Length: 0", body=HIDDEN),
    "bare-cr": post(b"X-A: b\rContent-Length: 5"),
    "chunk-0x": post(CHUNKED, body=b"0x0\r\n\r\n" + HIDDEN),
    "chunk-minus": post(CHUNKED, body=b"-0\r\n\r\n" + HIDDEN),
    "chunk-space": post(CHUNKED, body=b" 0\r\n\r\n" + HIDDEN),
    "chunk-bare-lf": post(CHUNKED, body=b"0\n\n" + HIDDEN),
    "chunk-extension-lf": post(CHUNKED, body=b"1;\nx\r\n0\r\n\r\n" + HIDDEN),
    "chunk-extension-quote": post(CHUNKED, body=b'0;a="\r\n\r\n' + HIDDEN),
    "chunk-shorter": post(CHUNKED, body=b"1\r\n{}\r\n0\r\n\r\n" + HIDDEN),
    "chunk-unended": post(CHUNKED, body=b"2\r\n{}0\r\n\r\n" + HIDDEN),
    "two-hosts": post(b"Host: elsewhere", LENGTH),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
@pytest.mark.parametrize("server", [0, 1], ids=["gateway", "nginx"])
def test_a_request_of_doubtful_length_is_refused(whole: Front, server: int, name: str) -> None:
    heard = say(whole.ports[server], AMBIGUOUS[name])
    assert len(heard.statuses) == 1 and heard.statuses[0] in (400, 501), heard
    assert heard.closed and b"smuggled" not in heard.text
    assert b"application/problem+json" in heard.text


UNAMBIGUOUS = {  # one length in every reader's eyes, so the body swallows what hides in it
    "bare-lf": post(b"Content-Length: %d" % len(HIDDEN), body=HIDDEN, line_end=b"\n"),
    "te-underscore": post(b"Transfer_Encoding: chunked", LENGTH),
    "body-of-a-get": HIDDEN.replace(b"\r\n\r\n", b"\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN)).replace(
        b"smuggled", b"asked"
    )
    + HIDDEN,
    "chunk-huge": post(CHUNKED, body=b"f" * 16 + b"\r\n" + HIDDEN),
}


@pytest.mark.parametrize("name", UNAMBIGUOUS)
@pytest.mark.parametrize("server", [0, 1], ids=["gateway", "nginx"])
def test_a_request_in_a_body_is_never_answered(whole: Front, server: int, name: str) -> None:
    heard = say(whole.ports[server], UNAMBIGUOUS[name])
    assert len(heard.statuses) <= 1 and b"smuggled" not in heard.text


def test_chunked_bodies_are_taken_and_nothing_after_them(whole: Front) -> None:
    body = json.dumps(SUBMIT).encode()
    sent = post(CHUNKED, body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) + HIDDEN)
    heard = say(whole.edge.port, sent)
    assert (heard.statuses, heard.closed) == ([202], True)
    assert say(whole.gateway.port, sent).statuses == [202, 200], "without Nginx the next request is one of its own"


def test_no_upgrade_leads_past_nginx(whole: Front) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    asked = HIDDEN.removesuffix(b"\r\n") + upgrade
    assert [say(port, asked).statuses for port in whole.ports] == [[200], [200]]
    connect = b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN
    for port in whole.ports:
        heard = say(port, connect)
        assert heard.closed and heard.statuses in ([400], [404], [405])


# ---- limits


@pytest.mark.parametrize("server", [0, 1], ids=["gateway", "nginx"])
def test_a_head_is_taken_up_to_its_limits(whole: Front, server: int) -> None:
    port = whole.ports[server]

    def asked(target: bytes = b"/health", *headers: bytes) -> int:
        lines = (b"GET " + target + b" HTTP/1.1", b"Host: localhost", b"Connection: close", *headers, b"", b"")
        return say(port, b"\r\n".join(lines)).statuses[0]

    room = 8190 - len(b"GET  HTTP/1.1") - (0, 2)[server]  # Nginx counts the line's end as well
    assert asked(b"/health?" + b"x" * (room - 10)) == 200
    assert asked(b"/health?" + b"x" * (room + 10)) == 414
    too_large = (431, 400)[server]
    assert asked(b"/health", b"X-A: " + b"x" * 8100) == 200
    assert asked(b"/health", b"X-A: " + b"x" * 8200) == too_large
    assert asked(b"/health", *[b"X-A: " + b"x" * 6000] * 3) == 200
    assert asked(b"/health", *[b"X-A: b"] * 90) == 200  # Nginx adds some of its own
    assert asked(b"/health", *[b"X-A: b"] * 300) == 431


def test_a_head_is_bounded_as_a_whole(whole: Front) -> None:
    large = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + (b"X-A: " + b"x" * 8000 + b"\r\n") * 9 + b"\r\n"
    assert say(whole.edge.port, large).statuses == [400]


@pytest.mark.parametrize("server", [0, 1], ids=["gateway", "nginx"])
def test_a_json_body_is_taken_up_to_its_limit(whole: Front, server: int) -> None:
    url = f"http://127.0.0.1:{whole.ports[server]}/api/submit"
    filler = json.dumps(SUBMIT)[:-1] + ', "init_image": "'
    for extra, status in ((0, 422), (1, 413)):  # 422: no picture, but read
        body = filler + "A" * (32 * 1024 * 1024 - len(filler) - 2 + extra) + '"}'
        answer = requests.post(url, body, headers={"Content-Type": "application/json"}, timeout=30)
        assert answer.status_code == status, answer.text[:200]


@pytest.mark.parametrize(
    ("server", "encoding"), [*product((0, 1), ("gzip", "deflate", "br", "gzip, gzip", "x"))], ids=str
)
def test_a_compressed_body_is_refused_unread(whole: Front, server: int, encoding: str) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    for path in ("/api/submit", "/api/images"):
        answer = requests.post(f"http://127.0.0.1:{whole.ports[server]}{path}", bomb, headers=headers, timeout=10)
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


# ---- what answers carry


def protection_of(answer: requests.Response) -> list[tuple[str, str]]:
    """The headers that protect an answer's reader, each as often as it came."""
    names = {name.lower(): name for name, _ in PROTECTION}
    return sorted((names[name.lower()], value) for name, value in answer.raw.headers.items() if name.lower() in names)


@pytest.mark.parametrize("server", [0, 1], ids=["gateway", "nginx"])
def test_every_answer_has_its_security_headers_once_and_none_for_other_origins(whole: Front, server: int) -> None:
    base = f"http://127.0.0.1:{whole.ports[server]}"
    asked = [
        requests.get(f"{base}/health", timeout=5, headers={"Origin": "https://evil.example"}),
        requests.get(f"{base}/nowhere", timeout=5),
        requests.get(f"{base}/_results/x", timeout=5),
        requests.post(f"{base}/api/submit", json=SUBMIT, timeout=5),
        requests.post(f"{base}/api/submit", json={}, timeout=5),
        requests.get(f"{base}/health", headers={"X-A": "x" * 9000}, timeout=5),  # Nginx's, or gunicorn's, own
        requests.get(f"{base}/health?{'x' * 9000}", timeout=5),
        requests.get(f"{base}/docs", timeout=5),
    ]
    assert [answer.status_code for answer in asked[:5]] == [200, 404, 404, 202, 422]
    for answer in asked[:-1]:
        assert protection_of(answer) == sorted(PROTECTION), answer.url[:60]
    assert ("Content-Security-Policy", POLICY) in protection_of(asked[-1])
    assert len(protection_of(asked[-1])) == len(PROTECTION)
    for answer in asked:
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
        assert answer.headers.get("Server", "nginx") in ("nginx", "gunicorn"), "no version"
        assert not {"X-Powered-By", "Via", "Set-Cookie"} & answer.headers.keys()


@pytest.mark.parametrize("server", [0, 1], ids=["gateway", "nginx"])
def test_preflights_are_refused(whole: Front, server: int) -> None:
    asks = {
        "Origin": "https://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, authorization",
    }
    for path in ("/api/submit", "/api/images", "/api/status/x", "/health", "/nowhere"):
        answer = requests.options(f"http://127.0.0.1:{whole.ports[server]}{path}", headers=asks, timeout=5)
        assert answer.status_code in (404, 405)
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


# ---- trust


def test_nginx_tells_who_asks_and_no_client_can(whole: Front) -> None:
    """A stranger's address in front of it would take the open tenant away from a local caller: it never arrives."""
    lie = dict.fromkeys(("X-Forwarded-For", "X_Forwarded_For", "Forwarded", "X-Real-IP"), "203.0.113.9")
    assert requests.get(f"{whole.edge.url}/api/workers", headers=lie, timeout=5).status_code == 200
    assert requests.get(f"{whole.gateway.url}/api/workers", headers=lie, timeout=5).status_code == 401


@pytest.mark.parametrize("server", [0, 1], ids=["gateway", "nginx"])
@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "10.0.0.1", "[::2]", "a@127.0.0.1:x", ""])
def test_a_name_that_was_made_to_point_here_is_not_served(whole: Front, server: int, host: str) -> None:
    asked = f"GET /api/tasks HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    heard = say(whole.ports[server], asked)
    assert heard.statuses[0] in (400, 403)
    assert b'"tasks"' not in heard.text


@pytest.mark.parametrize("server", [0, 1], ids=["gateway", "nginx"])
@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.9.9.9:1", "[::1]:8080"])
def test_this_machines_own_names_are(whole: Front, server: int, host: str) -> None:
    asked = f"GET /api/tasks HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    assert say(whole.ports[server], asked).statuses == [200]


@pytest.mark.parametrize("server", [0, 1], ids=["gateway", "nginx"])
def test_another_sites_page_can_submit_nothing(whole: Front, server: int) -> None:
    """A page may send without asking first: a form, plain text, or a Blob without a type."""
    url = f"http://127.0.0.1:{whole.ports[server]}/api/submit"
    body = json.dumps(SUBMIT)
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert requests.post(url, body, headers={"Content-Type": kind}, timeout=5).status_code == 415
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        for headers in ({"Origin": origin}, {"Origin": origin, "Content-Type": "application/json"}):
            assert requests.post(url, body, headers=headers, timeout=5).status_code == 403
    own = {"Origin": url.removesuffix("/api/submit"), "Content-Type": "application/json"}
    assert requests.post(url, body, headers=own, timeout=5).status_code == 202


def test_nginxs_own_answers_are_problems(whole: Front) -> None:
    heard = say(whole.edge.port, b"GET / HTTP/3.0\r\nHost: x\r\n\r\n")
    assert heard.statuses == [505] and b'"status":505' in heard.text
    assert_problem(requests.get(f"{whole.edge.url}/_problem", timeout=5), 404, "not_found")
