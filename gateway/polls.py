"""Repeated polls of one task's status by clients that know its ETag, answered from memory in front of Flask: so the
impatient cost little.

What was answered is remembered for a second at most, as a place in line moves without an event, and forgotten as soon
as anything is heard of the task. Without a subscription that hears everything nothing is remembered. Only whoever may
see as much as the one who was answered is answered from here, and only with a key that is known as good at this moment.
Whoever shows no ETag gets the task as it is on Redis now: events are heard a moment after they happen.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from werkzeug.http import parse_etags, unquote_etag

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
OF_304 = frozenset({"ETag", "Cache-Control"})  # headers

Headers: TypeAlias = list[tuple[str, str]]


@dataclass(slots=True)
class _Memo:
    """What was answered to a poll: empty until it has been, and out of reach if anything was heard meanwhile."""

    until: float
    reach: str | None = None  # of who was answered
    headers: Headers | None = None
    etag: str = ""

    def is_known(self, tags: str) -> bool:
        """Return whether what was answered is among these ETags of a client's."""
        return tags == self.etag or parse_etags(tags).contains_weak(unquote_etag(self.etag)[0] or "")


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
        task_id, tags = path[len(PREFIX) :], environ.get("HTTP_IF_NONE_MATCH")
        memo = self._memos.get(task_id)
        if memo is None or not tags or not self._serves(memo, environ) or not memo.is_known(tags):
            return self._ask(task_id, environ, start_response)
        self._hub.stay(STAY_S)
        environ.update({requestlog.ROUTE: ROUTE, requestlog.TASK_ID: task_id})
        start_response("304 NOT MODIFIED", [each for each in memo.headers or () if each[0] in OF_304])
        return ()

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
        if caller is not None:  # whoever has no key makes nobody listen
            self._hub.stay(STAY_S)
        if status not in ("200", "304") or caller is None:
            self._memos.pop(task_id, None)
            return answer
        memo.etag = dict(headers).get("ETag", "")
        memo.reach, memo.headers = caller.reach, headers
        return answer

    def _heard(self, task_id: str | None) -> None:
        if task_id is None:
            self._memos.clear()
        else:
            self._memos.pop(task_id, None)
