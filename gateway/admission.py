"""Who is asking: the tenant and the rights behind an API key, told before a request's body is read.

Every route wants a key unless it says that it is public, and a route that submits, a task or a picture ahead of one, is
counted against the key's rate. A fleet for which no key was ever made serves one open tenant with all rights, whatever
key is shown; but to nobody beyond this machine, and not by a gateway that listens beyond it, unless ZFLEET_INSECURE
allows that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from flask import Flask, Response, after_this_request, current_app, request

from common.apikeys import OPEN_TENANT, ApiKey, Token, proves
from common.broker import Broker
from common.errors import Forbidden, RateLimited, RedisUnavailable, Unauthenticated
from common.listening import beyond_loopback, is_loopback
from common.records import Tally
from common.schemas import Priority
from common.settings import Settings
from gateway.webpages import Visitors

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

F = TypeVar("F", bound=Callable[..., object])
Scope = Literal["public", "tenant", "admin"]

CALLER = "zfleet.caller"  # in the WSGI environment
KNOWN_S = 2.0  # what Redis says of a key is taken for so long; by then a revoked one is refused everywhere
MOST_KNOWN = 10_000
NOT_KNOWN: tuple[float, ApiKey | None] = (0.0, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Whoever sent a request: a tenant, by one of its keys. `key` is None for the open tenant."""

    tenant: str
    admin: bool = False
    key: ApiKey | None = None

    @property
    def key_id(self) -> str:
        return self.key.key_id if self.key else ""

    @property
    def priority_max(self) -> Priority:
        return self.key.priority_max if self.key else "high"

    @property
    def reach(self) -> str | None:
        """Whose tasks it may see: one tenant's, or, for None, everybody's."""
        return None if self.admin else self.tenant

    def may_see(self, tenant: str) -> bool:
        """Return whether the tasks of this tenant are there for it at all."""
        return self.admin or tenant == self.tenant


OPEN = Caller(tenant=OPEN_TENANT, admin=True)


class Doorkeeper:
    """Tells callers apart. What Redis says of a key is remembered for two seconds, so that polls cost it nothing."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        self._broker = broker
        self._insecure = settings.insecure
        self._visitors = Visitors(settings)
        self._closed = beyond_loopback(settings.host)  # even if Redis should lose its keys
        self._known: dict[str, tuple[float, ApiKey]] = {}
        self._guarded_until = 0.0
        self._guarded = True

    def admit(self, text: str | None, *, local: bool) -> Caller:
        """Return who shows this key; raises Unauthenticated, the same for none and every one that opens nothing."""
        key = self._proven(text)
        if key is not None:
            return _caller(key)
        if self._opens(local) and not self._is_guarded():
            return OPEN
        raise Unauthenticated("this call needs an API key: Authorization: Bearer zfk_…")

    def count(self, caller: Caller) -> Tally | None:
        """Count a submit of this caller; None, and no round trip, where its key has no rate."""
        rate = caller.key.rate if caller.key else None
        return self._broker.count(caller.key_id, rate) if rate else None

    def _proven(self, text: str | None) -> ApiKey | None:
        token = Token.parse(text) if text else None
        key = self._key(token.key_id) if token else None
        return key if token and proves(token, key) else None

    def _key(self, key_id: str) -> ApiKey | None:
        now = time.monotonic()
        until, known = self._known.get(key_id, NOT_KNOWN)
        if known is not None and now < until:
            return known
        key = self._broker.key(key_id)
        if key is not None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key_id] = (now + KNOWN_S, key)
        return key

    def identify(self) -> Caller:
        """Return who sent the current request; raises Unauthenticated, and Forbidden for another site's page."""
        found = self.admit(shown(request.environ), local=is_local(request.environ))
        if found.key is None:
            self._visitors.check(request.environ)
        return found

    def witness(self, environ: WSGIEnvironment) -> Callable[[], bool]:
        """Return what tells, for as long as a request's answer lasts, whether it may still see the whole fleet."""
        text, local = shown(environ), is_local(environ)

        def may_see() -> bool:
            try:
                return self.admit(text, local=local).admin
            except Unauthenticated:
                return False
            except RedisUnavailable:  # nothing says that it may not
                return True

        return may_see

    def recall(self, environ: WSGIEnvironment) -> Caller | None:
        """Return who sent a request if that is known at this moment without asking Redis, else None."""
        now, token = time.monotonic(), Token.parse(shown(environ) or "")
        until, key = self._known.get(token.key_id, NOT_KNOWN) if token else NOT_KNOWN
        if token and key and now < until and proves(token, key):
            return _caller(key)
        unguarded = now < self._guarded_until and not self._guarded
        opens = unguarded and self._opens(is_local(environ)) and not self._visitors.refusal(environ)
        return OPEN if opens else None

    def _opens(self, local: bool) -> bool:
        return self._insecure or (local and not self._closed)

    def _is_guarded(self) -> bool:
        now = time.monotonic()
        if now >= self._guarded_until:
            self._guarded = self._broker.guarded()
            self._guarded_until = now + KNOWN_S
        return self._guarded


def _caller(key: ApiKey) -> Caller:
    return Caller(tenant=key.tenant, admin=key.admin, key=key)


def install(app: Flask, doorkeeper: Doorkeeper) -> None:
    """Let nobody through to a view who may not call it, or not as often. No body has been read by then."""

    @app.before_request
    def check() -> None:
        view = current_app.view_functions.get(request.endpoint or "")
        scope: Scope = getattr(view, "scope", "tenant")
        if view is None or scope == "public":  # no such route: whoever asks is told so
            return
        who = doorkeeper.identify()
        if scope == "admin" and not who.admin:
            raise Forbidden("this call is for keys with the admin scope")
        request.environ[CALLER] = who
        if hasattr(view, "submits") and (tally := doorkeeper.count(who)):
            _obey(tally)


def open_to(scope: Scope) -> Callable[[F], F]:
    """Mark a view with who may call it; without a mark: every tenant."""

    def mark(view: F) -> F:
        view.scope = scope  # type: ignore[attr-defined]  # as Flask's own extensions mark views
        return view

    return mark


def submits(view: F) -> F:
    """Mark a view that takes in tasks or their pictures: each of its calls counts, whatever becomes of it."""
    view.submits = True  # type: ignore[attr-defined]
    return view


def caller() -> Caller:
    """Return whoever sent the current request, on any route that is not public."""
    found: Caller = request.environ[CALLER]
    return found


def shown(environ: WSGIEnvironment) -> str | None:
    """Return the API key that a request shows; None where it shows none, or two that differ."""
    scheme, _, value = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    keys = {value.strip()} if scheme.lower() == "bearer" else set()
    if "HTTP_X_API_KEY" in environ:
        keys.add(environ["HTTP_X_API_KEY"].strip())
    return keys.pop() if len(keys) == 1 else None


def is_local(environ: WSGIEnvironment) -> bool:
    """Return whether a request comes from this machine, and was not passed on for somebody elsewhere."""
    if "HTTP_FORWARDED" in environ:  # which our Nginx empties, and another proxy may write in many ways
        return False
    passed_on = (*environ.get("HTTP_X_FORWARDED_FOR", "").split(","), environ.get("HTTP_X_REAL_IP", ""))
    return all(is_loopback(address.strip()) for address in (environ.get("REMOTE_ADDR", ""), *passed_on) if address)


def _obey(tally: Tally) -> None:
    """Tell the caller how its rate stands, whatever is going to be answered; raises RateLimited."""

    @after_this_request
    def tell(response: Response) -> Response:
        response.headers["X-RateLimit-Limit"] = str(tally.limit)
        response.headers["X-RateLimit-Remaining"] = str(tally.remaining)
        response.headers["X-RateLimit-Reset"] = str(math.ceil(tally.reset_s))
        return response

    if tally.limited:
        raise RateLimited("this API key submits more often than it may; wait as Retry-After says", tally.retry_after_s)
