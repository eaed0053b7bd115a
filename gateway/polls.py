"""Repeated polls of one task's status, answered from memory in front of Flask, so that impatient clients cost little.

What was answered is remembered for a second at most, as a place in line moves without an event, and forgotten as soon
as anything is heard of the task. Without a subscription that hears everything nothing is remembered. Only whoever may
see as much as the one who was answered is answered from here, and only with a key that is known as good at this moment.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from werkzeug.http import parse_etags, unquote_etag
from werkzeug.wsgi import ClosingIterator

from gateway import admission, requestlog
from gateway.admission import Caller, Doorkeeper
from gateway.waiting import Hub

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

PREFIX = "/api/status/"
ROUTE = PREFIX + "<task_id>"

GOOD_S = 1.0
STAY_S = 5.0  # after the latest poll everything is listened to for so much longer
MOST_TASKS = 2_000
MOST_BYTES = 8_192  # of a body; of a larger one only the ETag is kept
OF_304 = frozenset({"ETag", "Cache-Control"})  # headers

Headers: TypeAlias = list[tuple[str, str]]


@dataclass(slots=True)
class _Memo:
    """What was answered to a poll: empty until it has been, and out of reach if anything was heard meanwhile."""

    until: float
    reach: str | None = None  # of who was answered
    headers: Headers | None = None
    etag: str = ""
    body: bytes | None = None

    def answer(self, known: str) -> tuple[str, Headers, Sequence[bytes]] | None:
        """Return the answer to whoever knows these ETags, if it is remembered well enough for that."""
        assert self.headers is not None
        if known and (known == self.etag or parse_etags(known).contains_weak(unquote_etag(self.etag)[0] or "")):
            return "304 NOT MODIFIED", [each for each in self.headers if each[0] in OF_304], ()
        return None if self.body is None else ("200 OK", self.headers.copy(), (self.body,))


class Polls:
    """Stands in front of an application whose status calls have ETags."""

    def __init__(self, app: WSGIApplication, doorkeeper: Doorkeeper, hub: Hub) -> None:
        self._app = app
        self._doorkeeper = doorkeeper
        self._hub = hub
        self._memos: dict[str, _Memo] = {}
        hub.overhear(self._heard)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if not path.startswith(PREFIX) or environ["REQUEST_METHOD"] != "GET" or environ.get("QUERY_STRING"):
            return self._app(environ, start_response)
        task_id = path[len(PREFIX) :]
        self._hub.stay(STAY_S)
        memo = self._memos.get(task_id)
        if memo is None or not self._serves(memo, environ):
            return self._ask(task_id, environ, start_response)
        answer = memo.answer(environ.get("HTTP_IF_NONE_MATCH", ""))
        if answer is None:
            return self._ask(task_id, environ, start_response)
        environ.update({requestlog.ROUTE: ROUTE, requestlog.TASK_ID: task_id})
        status, headers, body = answer
        start_response(status, headers)
        return body

    def _serves(self, memo: _Memo, environ: WSGIEnvironment) -> bool:
        if memo.headers is None or time.monotonic() >= memo.until:
            return False
        caller = self._doorkeeper.recall(environ)
        return caller is not None and caller.reach == memo.reach

    def _ask(self, task_id: str, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Have the application answer, and remember what. The memo is there before the task is looked at."""
        memo = _Memo(time.monotonic() + random.uniform(0.5, 1.0) * GOOD_S)  # not all at the same time
        if self._hub.hears_all:
            if len(self._memos) >= MOST_TASKS:
                self._memos.clear()
            self._memos[task_id] = memo
        told: list[tuple[str, Headers]] = []

        def start(status: str, headers: Headers, exc_info: Any = None, /) -> Any:
            told.append((status[:3], headers.copy()))
            return start_response(status, headers, exc_info)

        answer = self._app(environ, start)
        status, headers = told[-1]
        caller: Caller | None = environ.get(admission.CALLER)
        if status not in ("200", "304") or caller is None:
            self._memos.pop(task_id, None)
            return answer
        with contextlib.closing(ClosingIterator(answer)):
            body = b"".join(answer)
        memo.etag = dict(headers).get("ETag", "")
        memo.body = body if status == "200" and len(body) <= MOST_BYTES else None
        memo.reach, memo.headers = caller.reach, headers
        return (body,)

    def _heard(self, task_id: str | None) -> None:
        if task_id is None:
            self._memos.clear()
        else:
            self._memos.pop(task_id, None)
