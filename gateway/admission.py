"""Who is asking: the tenant and the rights behind an API key, told before a request's body is read.

Every route wants a key unless it says that it is public. A fleet for which no key was ever made serves one open tenant
with all rights, but to nobody beyond this machine, unless ZFLEET_INSECURE allows that.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from flask import Flask, current_app, request

from common.apikeys import OPEN_TENANT, ApiKey, Token, proves
from common.broker import Broker
from common.errors import Forbidden, Unauthenticated
from common.settings import Settings

F = TypeVar("F", bound=Callable[..., object])
Scope = Literal["public", "tenant", "admin"]

CALLER = "zfleet.caller"  # in the WSGI environment
KNOWN_S = 2.0  # a key that was good is taken as good for so long; by then a revoked one is refused everywhere
MOST_KNOWN = 10_000


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
        self._known: dict[str, tuple[float, Caller]] = {}
        self._guarded_until = 0.0
        self._guarded = True
        self._lock = threading.Lock()

    def admit(self, text: str | None, *, local: bool) -> Caller:
        """Return who shows this key; raises Unauthenticated, the same for every key that opens nothing."""
        if text is None:
            if (self._insecure or local) and not self._is_guarded():
                return OPEN
            raise Unauthenticated("this call needs an API key: Authorization: Bearer zfk_…")
        now = time.monotonic()
        found = self._known.get(text)
        if found and now < found[0]:
            return found[1]
        token = Token.parse(text)
        key = self._broker.key(token.key_id) if token else None
        if token is None or key is None or not proves(token, key):
            raise Unauthenticated("this call needs an API key: Authorization: Bearer zfk_…")
        caller = Caller(tenant=key.tenant, admin=key.admin, key=key)
        with self._lock:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[text] = (now + KNOWN_S, caller)
        return caller

    def _is_guarded(self) -> bool:
        if time.monotonic() >= self._guarded_until:
            self._guarded = self._broker.guarded()
            self._guarded_until = time.monotonic() + KNOWN_S
        return self._guarded


def install(app: Flask, doorkeeper: Doorkeeper) -> None:
    """Let nobody through to a view who may not call it."""

    @app.before_request
    def check() -> None:
        view = current_app.view_functions.get(request.endpoint or "")
        scope: Scope = getattr(view, "scope", "tenant")
        if view is None or scope == "public":  # no such route: whoever asks is told so
            return
        caller = doorkeeper.admit(shown(), local=is_local())
        if scope == "admin" and not caller.admin:
            raise Forbidden("this call is for keys with the admin scope")
        request.environ[CALLER] = caller


def open_to(scope: Scope) -> Callable[[F], F]:
    """Mark a view with who may call it; without a mark: every tenant."""

    def mark(view: F) -> F:
        view.scope = scope  # type: ignore[attr-defined]  # as Flask's own extensions mark views
        return view

    return mark


def caller() -> Caller:
    """Return whoever sent the current request, on any route that is not public."""
    found: Caller = request.environ[CALLER]
    return found


def shown() -> str | None:
    """Return the API key that the current request shows, or None."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    return request.headers.get("X-API-Key")


def is_local() -> bool:
    """Return whether the current request comes from this machine, and was not passed on for somebody elsewhere."""
    passed_on = request.headers.get("X-Forwarded-For", "")
    return all(
        _is_loopback(address.strip()) for address in (request.remote_addr or "", *passed_on.split(",")) if address
    )


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
