"""Where a webhook may lead: to https addresses of the whole world, and to what ZFLEET_WEBHOOK_ALLOW names.

The form of a URL is read by one parser, the WHATWG one of pydantic, for the check and for the connection alike: what it
says of `https://0x7f.1/` is what is connected to. What a name stands for is asked once for each try, and the connection
is made to the very addresses that were checked, so that a name server that changes its mind opens nothing.
"""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from pydantic import ValidationError
from pydantic_core import Url

from common.errors import ConfigurationError, InvalidRequest

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve: TypeAlias = Callable[[str, int], Sequence[str]]

RESOLVE_S = (
    5.0  # for name servers to answer, of the ten that a try has: the system's own patience may outlast its lease
)

REMEDY = "must be an https URL of a host that the whole world can reach, without user or password"
_ENTRY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s/@:\[\]]+)(?::([0-9]{1,5}))?")
_INNER = [  # as well as what Python's ipaddress knows, which is more in some of its versions than in others
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # IETF's (RFC 6890); of it a cloud takes 192.0.0.192 for what its machines may know
        "192.88.99.0/24",  # 6to4 relays (RFC 7526)
        "168.63.129.16/32",  # a cloud's own services, on every machine of its
        "3fff::/20",  # documentation (RFC 9637)
    )
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Refused(Exception):
    """Raised for what a webhook must not lead to. Its text is told to the owner, and repeats nothing of the URL."""


class Target(NamedTuple):
    """A URL in the parts that a connection needs. `host` is as it stands in a URL: an IPv6 address has brackets."""

    scheme: str
    host: str
    port: int
    path: str  # with the query
    allowed: bool  # named by the operator

    @property
    def netloc(self) -> str:
        """What the Host header says."""
        default = {"https": 443, "http": 80}[self.scheme]
        return self.host if self.port == default else f"{self.host}:{self.port}"

    @property
    def address(self) -> Address | None:
        """The address that stands in place of a host name, if one does."""
        try:
            return ipaddress.ip_address(self.host.strip("[]"))
        except ValueError:
            return None


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host name, in the order in which to try them; raises OSError, UnicodeError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in found))


class Targets:
    """Knows good targets from bad ones. Never changed, so safe to share."""

    def __init__(self, allow: Iterable[str] = (), resolve: Resolve = resolve) -> None:
        """`allow`: hosts, or host:port, for which http and addresses inside will do; raises ConfigurationError."""
        self._allowed = frozenset(_entry(text) for text in allow)
        self._resolve = resolve

    def check(self, url: str) -> None:
        """Raise InvalidRequest unless the URL may lead somewhere, by its form. No name server is asked."""
        try:
            self.parse(url)
        except Refused as refused:
            raise InvalidRequest.field("webhook.url", str(refused)) from None

    def parse(self, url: str) -> Target:
        """Return a URL's parts; raises Refused for one that a webhook cannot have."""
        try:
            parts = Url(url)
        except ValidationError:
            raise Refused(REMEDY) from None
        host = (parts.host or "").rstrip(".")
        if parts.scheme not in ("https", "http") or not host or not parts.port:
            raise Refused(REMEDY)
        if parts.username or parts.password:
            raise Refused(f"{REMEDY}; put a token into the path or the query instead")
        allowed = not self._allowed.isdisjoint({(host, None), (host, parts.port)})
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = Target(parts.scheme, host, parts.port, path, allowed)
        if not allowed:
            if parts.scheme != "https":
                raise Refused(REMEDY)
            if host == "localhost" or host.endswith(".localhost") or (target.address and not public(target.address)):
                raise Refused(f"{REMEDY}: not one of this machine or of an inner network")
        return target

    def addresses(self, target: Target) -> list[str]:
        """Return the addresses to connect to; raises Refused if there are none, or any leads inside."""
        if target.address:
            return [str(target.address)]
        try:
            found = self._resolved(target)
        except TimeoutError:
            raise Refused("no name server told the address of its host in time") from None
        except (OSError, UnicodeError):
            raise Refused("its host name has no address") from None
        if not target.allowed and not all(public(ipaddress.ip_address(address)) for address in found):
            raise Refused("its host name stands for an address that is not public")
        return list(found)

    def _resolved(self, target: Target) -> Sequence[str]:
        """Return what a host name stands for; raises OSError, as TimeoutError, and UnicodeError."""
        answer: queue.SimpleQueue[Sequence[str] | OSError | UnicodeError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answer.put(self._resolve(target.host, target.port))
            except (OSError, UnicodeError) as error:
                answer.put(error)

        threading.Thread(target=ask, name="resolve", daemon=True).start()
        try:
            found = answer.get(timeout=RESOLVE_S)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(found, OSError | UnicodeError):
            raise found
        return found


def public(address: Address) -> bool:
    """Return whether an address is of the world outside, and so is any other that it carries inside."""
    if isinstance(address, ipaddress.IPv6Address):
        if carried := _carried(address):
            return all(public(inner) for inner in carried)
        if address.is_reserved or address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _INNER)


def _carried(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that a mapped, 6to4, Teredo or NAT64 address leads to."""
    if address in _NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return [inner for inner in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())) if inner is not None]


def _entry(text: str) -> tuple[str, int | None]:
    match = _ENTRY.fullmatch(text)
    try:
        host = Url(f"http://{match[1]}/").host if match else None
    except ValidationError:
        host = None
    if match is None or not host:
        raise ConfigurationError(
            f"ZFLEET_WEBHOOK_ALLOW: {text!r} is no host or host:port (an IPv6 address in brackets)"
        )
    return host.rstrip("."), int(match[2]) if match[2] else None
