"""What a web page can make its visitor's browser send here, which a gateway that wants no key must not do for it.

A page of another site may send requests (then the browser names that site in `Origin`), and may have its own name
point to this machine, so that the browser takes this gateway for a part of that site (DNS rebinding: then `Host` has
that name).
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

from common.errors import Forbidden
from common.settings import Settings

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


_HOST = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<address>[0-9A-Fa-f:.]+)\])(?::[0-9]{1,5})?")


class Visitors:
    """Which requests a browser on this machine may have been talked into."""

    def __init__(self, settings: Settings) -> None:
        self._insecure = settings.insecure
        own = (
            settings.host,
            *(url.partition("://")[2].partition("/")[0] for url in (settings.url, settings.public_url)),
        )
        self._own = {name for name in map(_hostname, own) if name}

    def check(self, environ: WSGIEnvironment) -> None:
        """Raise Forbidden for a request that another site's page may have sent."""
        if reason := self.refusal(environ):
            raise Forbidden(reason)

    def refusal(self, environ: WSGIEnvironment) -> str:
        """Return why a request is none of this machine's own, or nothing where it is."""
        host: str | None = environ.get("HTTP_HOST")
        if host is None:  # no browser's
            return ""
        if not self._is_ours(_hostname(host)):
            return (
                "without API keys this gateway answers to localhost, to loopback addresses and to the host of "
                "ZFLEET_URL or ZFLEET_PUBLIC_URL; use one of them, or make a key: zfleet keys create"
            )
        origin: str | None = environ.get("HTTP_ORIGIN")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return "without API keys this gateway answers to no page of another site"
        return ""

    def _is_ours(self, name: str) -> bool:
        if name in self._own or name == "localhost":
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:  # with ZFLEET_INSECURE also names as those of compose; nobody can register one without a dot
            return self._insecure and name != "" and "." not in name
        return self._insecure or address.is_loopback


def _hostname(host: str) -> str:
    """Return a Host's name or address without its port; nothing for what is no Host."""
    match = _HOST.fullmatch(host)
    return (match["name"] or match["address"] or "").lower() if match else ""
