"""One POST to somebody else's machine, which may answer late, never, or without end."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import Retry

from gateway.webhooks.targets import Target

CONNECT_S = 3.0  # to one address, and as long for TLS; there may be others
ANSWER_MAX_BYTES = 64 * 1024  # of a body, which nobody looks at: it is read so that its sender can end in peace
ALL_MAX_BYTES = 2 * ANSWER_MAX_BYTES  # with heads, those before the last one, chunks' sizes and trailers
GONE = 410
MAY_ASK_FOR_TIME = (429, 503)

_FAILURES = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError)


class Unreachable(Exception):
    """Raised when no answer came. Its text is told to the owner, and repeats nothing of the URL."""


class Answer(NamedTuple):
    """What a receiver said: its status, and when it wants to be asked again."""

    status: int
    retry_after_s: float | None = None

    @property
    def accepted(self) -> bool:
        return 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """Whether it never wants to hear of this again."""
        return self.status == GONE


class Cutoff:
    """Ends a try from outside once its time is up, however slowly something still trickles in."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.passed = False
        self._until = time.monotonic() + seconds
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self.cut)
        self._timer.daemon = True

    @property
    def left_s(self) -> float:
        return self._until - time.monotonic()

    def watch(self, connection: socket.socket | None) -> None:
        """Cut this connection when the time is up; at once if it is already."""
        with self._lock:
            self._socket = connection
        if self.passed:
            self.cut()

    def cut(self) -> None:
        """End the try now."""
        with self._lock:
            self.passed = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it may just have ended by itself
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # TLS's own would take its state away

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()


class _Bounded(io.RawIOBase):
    """What a connection says, up to ALL_MAX_BYTES; then it counts as broken."""

    def __init__(self, connection: io.RawIOBase) -> None:
        self._connection = connection
        self._left = ALL_MAX_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int | None:  # type: ignore[override]  # wider in typeshed
        if self._left <= 0:
            raise OSError("no end of the answer")
        count: int | None = self._connection.readinto(buffer[: self._left])
        self._left -= count or 0
        return count

    def close(self) -> None:
        self._connection.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that is bounded as a whole, after any that are not final, as 103 Early Hints."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach()))

    def begin(self) -> None:
        super().begin()
        while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            self.headers = None  # type: ignore[assignment]  # by which http.client knows that it has to begin
            super().begin()


class Poster:
    """Posts to checked addresses only: it asks no name server, follows no redirect and knows no proxy."""

    def __init__(self) -> None:
        self._tls = ssl.create_default_context()  # OpenSSL's own certificates, or those of SSL_CERT_FILE

    def post(
        self, target: Target, addresses: Sequence[str], body: str, headers: Mapping[str, str], cutoff: Cutoff
    ) -> Answer:
        """Return the answer of the first address that takes a connection; raises Unreachable."""
        try:
            connection = self._connect(target, addresses, cutoff)
        except _FAILURES as error:
            raise Unreachable(_why(error, cutoff)) from None
        try:
            cutoff.watch(connection.sock)
            head = {"Host": target.netloc, **headers}
            connection.request("POST", target.path, body=body.encode(), headers=head, preload_content=False)
            response = connection.getresponse()
            if cutoff.passed:  # http.client takes an end in the midst of the headers for their end
                raise TimeoutError
            with contextlib.suppress(*_FAILURES):  # its status has been heard, and that is what counts
                response.read(ANSWER_MAX_BYTES, decode_content=False)
            return Answer(response.status, _retry_after_s(response))
        except _FAILURES as error:
            raise Unreachable(_why(error, cutoff)) from None
        finally:
            cutoff.watch(None)
            connection.close()

    def _connect(self, target: Target, addresses: Sequence[str], cutoff: Cutoff) -> HTTPConnection:
        failure: Exception = TimeoutError()
        for address in addresses:
            if cutoff.passed or cutoff.left_s <= 0:
                raise TimeoutError
            connection = self._connection(target, address, min(CONNECT_S, cutoff.left_s))
            try:
                connection.connect()
            except ssl.SSLError:
                connection.close()
                raise
            except _FAILURES as error:
                connection.close()
                failure = error
            else:
                connection.timeout = max(0.001, cutoff.left_s)  # from here on
                return connection
        raise failure

    def _connection(self, target: Target, address: str, timeout_s: float) -> HTTPConnection:
        if target.scheme == "http":
            connection = HTTPConnection(address, target.port, timeout=timeout_s)
        else:
            connection = HTTPSConnection(
                address, target.port, timeout=timeout_s, ssl_context=self._tls, server_hostname=target.host.strip("[]")
            )
        connection.response_class = _Response
        return connection


def _why(error: Exception, cutoff: Cutoff) -> str:
    late = isinstance(error, TimeoutError | urllib3.exceptions.TimeoutError)
    if cutoff.passed or (late and not isinstance(error, urllib3.exceptions.NewConnectionError)):
        return f"no answer within {cutoff.seconds:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate is not one for this host, or not by an authority known here"
    if isinstance(error, ssl.SSLError):
        return "no TLS connection could be made"
    return "the connection was refused, or broke"


def _retry_after_s(response: urllib3.BaseHTTPResponse) -> float | None:
    value = response.headers.get("Retry-After") if response.status in MAY_ASK_FOR_TIME else None
    try:
        return float(Retry().parse_retry_after(value)) if value else None
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return None
