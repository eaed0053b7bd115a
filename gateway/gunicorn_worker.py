"""gunicorn's gevent worker, made to stop at once when nothing is lost by it, and to send an answer in one piece.

gunicorn's parent imports this file before gevent has patched anything; so the rest of the gateway is imported late.
"""

from __future__ import annotations

import contextlib
import signal
from types import FrameType
from typing import Any

import gevent  # type: ignore[import-untyped]
from gunicorn.http.errors import ParseException  # type: ignore[import-untyped]
from gunicorn.workers.ggevent import GeventWorker  # type: ignore[import-untyped]

from gateway.slowclients import ClientSocket

DRAIN_EVERY_S = 0.1


class _Idle(gevent.Timeout):  # type: ignore[misc]  # gevent ships no types
    """The time a connection may be kept open for its next request, known to the worker while it runs."""

    def __init__(self, seconds: float, idle: dict[_Idle, gevent.Greenlet]) -> None:
        super().__init__(seconds, False)
        self._idle = idle

    def __enter__(self) -> _Idle:
        self._idle[self] = gevent.getcurrent()
        entered: _Idle = super().__enter__()
        return entered

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        del self._idle[self]
        over: bool | None = super().__exit__(kind, error, trace)
        return over

    def expire(self) -> None:
        """End the wait now, unless a request has come in. Runs between greenlets, so that neither is cut short."""
        if (greenlet := self._idle.get(self)) is not None:
            greenlet.throw(self)


class _OneWrite:
    """A client's socket that holds an answer's head back until the first of its body is there to go with it.

    gunicorn sends the two apart, and a call into the kernel costs a tenth of a short answer's time.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._head: bytes | None = None
        self._began = False

    def sendall(self, data: bytes) -> None:
        if not self._began:
            self._began, self._head = True, data
            return
        head, self._head = self._head, None
        self._sock.sendall(head + data if head else data)

    def flush(self) -> None:
        """Send the head of an answer that has no body."""
        if self._head is not None:
            head, self._head = self._head, None
            self._sock.sendall(head)

    def __getattr__(self, name: str) -> Any:
        self.flush()  # whatever is done to the socket otherwise comes after what was written
        return getattr(self._sock, name)


class Worker(GeventWorker):  # type: ignore[misc]  # gunicorn ships no types
    """On SIGTERM, whoever waits for a task is answered, idle connections are closed, other requests are finished."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle: dict[_Idle, gevent.Greenlet] = {}

    def init_process(self) -> None:
        # gunicorn looks some 25 settings up for each request, through a __getattr__ that plain attributes come before
        self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
        super().init_process()

    def timeout_ctx(self) -> _Idle:
        return _Idle(self.cfg.keepalive, self._idle)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        super().handle(listener, ClientSocket(client), addr)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        one = _OneWrite(sock)
        sock.expect_body()
        try:
            return super().handle_request(listener_name, req, one, addr)
        finally:
            one.flush()
            sock.expect_head()

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        if req is not None or not isinstance(exc, ParseException):
            super().handle_error(req, client, addr, exc)
            return
        # gunicorn's own answer is HTML, and its line in the log repeats what was sent
        from gateway import problems

        problems.log.info("request_unreadable", error=type(exc).__name__)
        with contextlib.suppress(OSError):
            client.sendall(problems.unreadable(exc))

    def handle_exit(self, sig: signal.Signals, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        gevent.spawn(self._drain)

    def _drain(self) -> None:
        from gateway.app import close

        close(self.wsgi)
        while True:
            for idle in list(self._idle):
                gevent.get_hub().loop.run_callback(idle.expire)
            gevent.sleep(DRAIN_EVERY_S)
