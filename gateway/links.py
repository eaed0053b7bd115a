"""Links to pictures that need no API key: signed, for an hour, for one picture each, for whoever holds them."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable

from flask import request

from common.listening import is_loopback
from gateway.admission import Caller

LINK_S = 3600  # as OpenAI's, which its clients count on
SECRET_S = 60.0  # a secret is taken as the fleet's for so long, and then asked for again: Redis may have lost it
PURPOSE = "links"

BEARER = Caller(tenant="", admin=True)  # whoever holds a good link: it says itself which picture may be seen


class Links:
    """Makes and knows the links of this fleet. The secret behind them comes from Redis with the first that is needed.

    Every method but `proves` reads the request that is being served.
    """

    def __init__(self, shared_secret: Callable[[str], bytes], public_url: str = "") -> None:
        self._shared_secret = shared_secret
        self._public_url = public_url
        self._secret = b""
        self._until = 0.0

    def url(self, path: str) -> str:
        """Return the whole URL under which this path answers to anybody for LINK_S; raises RedisUnavailable."""
        expires = str(int(time.time()) + LINK_S)
        return f"{self._origin()}{path}?expires={expires}&signature={self._signature(path, expires)}"

    def proves(self, path: str, expires: str, signature: str) -> bool:
        """Return whether these two stand in a link to this path that is good now; raises RedisUnavailable."""
        made_here = hmac.compare_digest(self._signature(path, expires).encode(), signature.encode("utf-8", "replace"))
        return made_here and int(expires) >= time.time()

    def _origin(self) -> str:
        """Return the gateway's address as the client wrote it. Nginx says by which scheme, if it is on this machine."""
        if self._public_url:
            return self._public_url
        said = request.headers.get("X-Forwarded-Proto", "")
        trusted = said in ("http", "https") and is_loopback(request.remote_addr or "")
        return f"{said if trusted else request.scheme}://{request.host}" if request.host else ""

    def _signature(self, path: str, expires: str) -> str:
        """Return the HMAC-SHA256 of a path and the last second at which it is open, in hexadecimal."""
        now = time.monotonic()
        if now >= self._until:
            self._secret, self._until = self._shared_secret(PURPOSE), now + SECRET_S
        return hmac.new(self._secret, f"{path}?{expires}".encode("utf-8", "replace"), "sha256").hexdigest()
