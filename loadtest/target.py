"""Where load may be sent: this machine, and nowhere else."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


class NotLoopback(ValueError):
    """Raised when a target is not on this machine."""


def require_loopback(url: str) -> str:
    """Return the URL, without a trailing slash; raises NotLoopback unless it leads to localhost, 127.x.x.x or ::1."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port  # reading the port is what checks it
    except ValueError:
        raise NotLoopback(f"{url!r} is not a URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise NotLoopback(f"{url!r} is not a gateway's URL; it looks like http://127.0.0.1:8080")
    if not _is_loopback(host):
        raise NotLoopback(f"{url!r} is not on this machine; load is sent to loopback only, as http://127.0.0.1:8080")
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name; what it resolves to may change, so it is not followed
