"""Where a gateway may listen: on loopback as it likes, elsewhere only once the fleet has API keys.

`python -m common.listening HOST…` is that check as a process: exit code 2 and a line on stderr where it may not.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import sys
from collections.abc import Sequence

from common.errors import ConfigurationError, RedisUnavailable
from common.settings import Settings, load_settings

REFUSED = 2


@functools.lru_cache(maxsize=1024)
def is_loopback(address: str) -> bool:
    """Return whether this is an IP address that only this machine can reach."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def beyond_loopback(host: str) -> bool:
    """Return whether other machines may reach what listens on this host. A name counts by all that it resolves to."""
    try:
        found = socket.getaddrinfo(host, None) if host else []  # no host: every address
    except (OSError, UnicodeError):
        found = []
    return not found or not all(is_loopback(str(address[0])) for *_, address in found)


def check(hosts: Sequence[str], settings: Settings) -> str | None:
    """Return what the operator should hear, if anything; raises ConfigurationError where nobody may listen there.

    While Redis is away it is unknown whether there are keys. That is no reason not to start: whoever listens beyond
    loopback serves nobody without a key anyhow (gateway/admission.py).
    """
    outside = [host for host in hosts if beyond_loopback(host)]
    if settings.insecure or not outside:
        return None
    from common.broker import Broker  # late: gunicorn's parent imports this file, and gevent patches after that

    broker = Broker(settings)
    try:
        guarded = broker.guarded()
    except RedisUnavailable as error:
        return f"whether there are API keys is unknown ({error.message}); nobody is served without one"
    finally:
        broker.close()
    if not guarded:
        raise ConfigurationError(
            f"not listening on {outside[0]!r}, which other machines reach, as this fleet has no API key yet: make one "
            "with `zfleet keys create --tenant NAME`, or listen on 127.0.0.1, or say --insecure (ZFLEET_INSECURE=1)"
        )
    return None


def main(hosts: Sequence[str]) -> int:
    """Check these hosts by this process's settings; return an exit code."""
    try:
        said, code = check(hosts, load_settings()), 0
    except ConfigurationError as error:
        said, code = error.message, REFUSED
    if said:
        sys.stderr.write(f"zfleet: {said}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
