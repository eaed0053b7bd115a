"""One POST to receivers that are real and badly behaved."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.webhooks.post import ANSWER_MAX_BYTES, Answer, Cutoff, Poster, Unreachable
from gateway.webhooks.targets import Target
from tests.receivers import HOST, Handler, Receiver
from tests.servers import free_port

HEADERS = {"Content-Type": "application/json", "webhook-id": "x"}


@pytest.fixture
def receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with Receiver(tmp_path) as receiver:
        monkeypatch.setenv("SSL_CERT_FILE", str(receiver.certificate))
        yield receiver


def post(
    receiver: Receiver, host: str = HOST, addresses: tuple[str, ...] = ("127.0.0.1",), within_s: float = 5.0
) -> Answer:
    target = Target("https" if receiver.certificate else "http", host, receiver.port, "/told?a=b", True)
    with Cutoff(within_s) as cutoff:
        return Poster().post(target, addresses, '{"é": 1}', HEADERS, cutoff)


def test_it_is_told_by_the_name_at_the_address(receiver: Receiver) -> None:
    assert post(receiver) == Answer(200)
    (heard,) = receiver.heard
    assert (heard.path, heard.body, heard.server_name) == ("/told?a=b", '{"é": 1}', HOST)
    assert heard.headers["host"] == f"{HOST}:{receiver.port}"
    assert heard.headers["content-type"] == "application/json"


def test_a_certificate_for_another_name_is_refused(receiver: Receiver) -> None:
    with pytest.raises(Unreachable, match="certificate"):
        post(receiver, "other.example")
    assert receiver.heard == []


def test_a_certificate_that_nobody_signed_is_refused(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(Unreachable, match="certificate"):
        post(receiver)


def test_an_address_in_place_of_a_name_is_verified_too(receiver: Receiver) -> None:
    assert post(receiver, "127.0.0.1").accepted
    assert receiver.heard[0].server_name is None


def test_http_where_it_is_allowed() -> None:
    with Receiver() as receiver:
        assert post(receiver).accepted


@pytest.mark.parametrize("status", [200, 204, 299, 302, 307, 404, 410, 429, 500, 503])
def test_the_answer_is_its_status(receiver: Receiver, status: int) -> None:
    there = f"https://127.0.0.1:{receiver.port}/elsewhere"
    receiver.behaviour = lambda handler: handler.answer(status, b"" if status == 204 else b"x", Location=there)
    answer = post(receiver)
    assert (answer.status, answer.accepted, answer.gone) == (status, status < 300, status == 410)
    assert len(receiver.heard) == 1, "it went to where a redirect pointed"


@pytest.mark.parametrize(
    ("status", "value", "seconds"),
    [(429, "7", 7), (503, "7", 7), (500, "7", None), (429, "soon", None), (429, "", None), (429, "-1", None),
     (503, "Wed, 21 Oct 2015 07:28:00 GMT", 0), (429, "9" * 400, 21_600)],
    ids=range(8),
)  # fmt: skip
def test_a_wish_for_time_is_heard(receiver: Receiver, status: int, value: str, seconds: float | None) -> None:
    receiver.behaviour = lambda handler: handler.answer(status, Retry_After=value)
    assert post(receiver).retry_after_s == seconds


def test_a_proxy_of_the_environment_is_not_asked(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    assert post(receiver).accepted


def test_the_next_address_is_tried_where_one_takes_no_connection(receiver: Receiver) -> None:
    assert post(receiver, addresses=("127.0.0.99", "127.0.0.1")).accepted
    with pytest.raises(Unreachable, match="refused"):
        post(receiver, addresses=("127.0.0.99",))


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 4096)


def test_a_body_without_end_is_left_unread(receiver: Receiver) -> None:
    receiver.behaviour = endless
    began = time.monotonic()
    assert post(receiver).accepted
    assert time.monotonic() - began < 3
    assert ANSWER_MAX_BYTES == 65_536


def trickle(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-Y: z")
        time.sleep(0.02)


def trickled_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def test_headers_that_trickle_in_are_cut_off(receiver: Receiver) -> None:
    receiver.behaviour = trickle
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"no answer within 0\.4 s"):
        post(receiver, within_s=0.4)
    assert 0.35 < time.monotonic() - began < 2


def test_a_body_that_trickles_in_does_not_undo_the_status(receiver: Receiver) -> None:
    receiver.behaviour = trickled_body
    began = time.monotonic()
    assert post(receiver, within_s=0.4).accepted
    assert time.monotonic() - began < 2


def test_one_that_hangs_is_cut_off(receiver: Receiver) -> None:
    receiver.behaviour = receiver.hang
    began = time.monotonic()
    with pytest.raises(Unreachable, match="no answer within"):
        post(receiver, within_s=0.3)
    assert time.monotonic() - began < 2


def test_an_answer_may_take_longer_than_a_connection(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.webhooks.post.CONNECT_S", 0.2)
    receiver.behaviour = lambda handler: (time.sleep(0.5), handler.answer())[1]
    assert post(receiver).accepted


def test_one_that_shakes_no_hands_is_cut_off(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, Cutoff(0.3) as cutoff:
        target = Target("https", HOST, silent.getsockname()[1], "/", True)
        began = time.monotonic()
        with pytest.raises(Unreachable, match="no answer within"):
            Poster().post(target, ["127.0.0.1"], "{}", HEADERS, cutoff)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "said",
    [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 two hundred\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
     b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"],
    ids=["nothing", "ssh", "words", "long", "many"],
)  # fmt: skip
def test_what_is_no_http_is_a_failure(receiver: Receiver, said: bytes) -> None:
    receiver.behaviour = lambda handler: handler.wfile.write(said)
    with pytest.raises(Unreachable):
        post(receiver)


@pytest.mark.parametrize("status", [100, 102, 103, 199])
def test_what_comes_before_the_answer_is_not_the_answer(receiver: Receiver, status: int) -> None:
    first = f"HTTP/1.1 {status} Not Yet\r\nLink: </x>\r\n\r\n".encode()
    receiver.behaviour = lambda handler: (handler.wfile.write(first * 3), handler.answer(204, b""))[1]
    assert post(receiver) == Answer(204)


def pour(start: bytes, again: bytes) -> Callable[[Handler], None]:
    """A behaviour: say something without end."""

    def behave(handler: Handler) -> None:
        handler.wfile.write(start)
        while True:
            handler.wfile.write(again * 1000)

    return behave


@pytest.mark.parametrize("status", [100, 103])
def test_answers_without_end_are_cut_off_by_their_length(receiver: Receiver, status: int) -> None:
    receiver.behaviour = pour(b"", f"HTTP/1.1 {status} Not Yet\r\n\r\n".encode())
    began = time.process_time()
    with pytest.raises(Unreachable, match="broke"):
        post(receiver)
    assert time.process_time() - began < 2.5  # and not for as long as it lasts


@pytest.mark.parametrize("again", [b"X: y\r\n", b"0" * 60, b"1\r\nx\r\n"], ids=["trailers", "size", "chunks"])
def test_chunks_without_end_do_not_undo_the_status(receiver: Receiver, again: bytes) -> None:
    start = b"" if again.startswith(b"1") else b"0\r\n"
    receiver.behaviour = pour(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + start, again)
    began = time.monotonic()
    assert post(receiver).accepted
    assert time.monotonic() - began < 4


def test_a_try_that_was_given_up_connects_no_more(receiver: Receiver) -> None:
    target = Target("https", HOST, receiver.port, "/", True)
    cutoff = Cutoff(5)
    cutoff.cut()
    with pytest.raises(Unreachable):
        Poster().post(target, ["127.0.0.1"], "{}", HEADERS, cutoff)
    assert receiver.heard == []
