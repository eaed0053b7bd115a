"""Redis from a URL: TLS, Sentinel, time-outs, and retries that are safe because every transition may be sent twice."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel
from retrying import Retrying

from common.errors import ConfigurationError, RedisUnavailable
from common.settings import mask_url

T = TypeVar("T")

FIRST_WAIT_MS = 25  # between the first two tries; doubles from there
LONGEST_WAIT_MS = 1_000
POOL_SIZE = 64  # connections; more callers than that wait for one

# at the beginning, or where Redis 6 has it when a command inside a script was refused
_BUSY = re.compile(r"(?:^|: -)(?:LOADING|MISCONF|MASTERDOWN|TRYAGAIN|UNBLOCKED|OOM|READONLY) ")


def connect(url: str, *, timeout_s: float, decode: bool = True, pool_size: int = POOL_SIZE) -> redis.Redis:
    """Return a client for redis://, rediss://, unix:// or redis+sentinel://host:port,host:port/service/db.

    The client itself never re-sends a command: `patiently` does, so that the number of tries is decided in one place.
    Raises ConfigurationError when the URL cannot be understood.
    """
    options: dict[str, Any] = {
        "decode_responses": decode,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "driver_info": None,
    }
    try:
        if url.startswith(("redis+sentinel://", "rediss+sentinel://")):
            return _from_sentinel(url, options)
        pool = _Pool.from_url(url, max_connections=pool_size, timeout=timeout_s, **options)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"ZFLEET_REDIS_URL {mask_url(url)!r}: {error}") from None
    return redis.Redis(connection_pool=pool)


def command(client: redis.Redis, *args: str | float) -> Any:
    """Send one command and return its plain reply: without redis-py's metrics, which take as long as the command."""
    pool: Any = client.connection_pool
    connection = pool.get_connection()
    try:
        connection.send_command(*args)
        return connection.read_response()  # both close the connection on any error
    finally:
        pool.release(connection)


class _Pool(redis.BlockingConnectionPool):
    """A pool that hands a connection out without first looking whether it is still good.

    redis-py polls the socket before every command, which under gevent costs more than the command. A connection that
    died shows it by an error, and `patiently` sends again; one that was left in the middle of a reply has been closed.
    """

    def make_connection(self) -> Any:
        connection: Any = super().make_connection()  # type: ignore[no-untyped-call]
        look = connection.can_read
        connection.can_read = lambda timeout=0: timeout > 0 and look(timeout)
        return connection


def _from_sentinel(url: str, options: dict[str, Any]) -> redis.Redis:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    service, _, database = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("name the Sentinel service, as in redis+sentinel://host:26379/mymaster/0")
    nodes = []
    for host in hosts.split(","):
        name, _, port = host.partition(":")
        nodes.append((name, int(port or 26379)))
    options |= dict(parse_qsl(parts.query))
    if parts.scheme.startswith("rediss"):
        options["ssl"] = True
    untyped: Any = Sentinel  # redis-py gives this class no types
    sentinel = untyped(
        nodes, sentinel_kwargs={k: options[k] for k in ("socket_timeout", "socket_connect_timeout")}, **options
    )
    client: redis.Redis = sentinel.master_for(
        service, db=int(database or 0), username=unquote(user) or None, password=unquote(password) or None
    )
    return client


def transient(error: BaseException) -> bool:
    """Whether the same command may succeed a little later: Redis is away, loading, failing over or refusing writes."""
    if isinstance(error, redis.ConnectionError | redis.TimeoutError | redis.ReadOnlyError):
        return True
    return isinstance(error, redis.ResponseError) and _BUSY.search(str(error)) is not None


def patiently(
    call: Callable[[], T], *, patience_s: float, timeout_s: float, give_up: Callable[[], bool] = lambda: False
) -> T:
    """Run `call`, again and again with growing waits while Redis is away, and return what it returns.

    Stops when the next try could end past `patience_s` or when `give_up` says so, and then raises RedisUnavailable.
    """
    began = time.monotonic()

    def stop(_attempt: int, _elapsed_ms: float) -> bool:
        return give_up() or time.monotonic() - began + timeout_s > patience_s

    retrying = Retrying(
        retry_on_exception=transient,
        stop_func=stop,
        wait_exponential_multiplier=FIRST_WAIT_MS // 2,  # an int: as a float it overflows after 1,023 tries
        wait_exponential_max=LONGEST_WAIT_MS,
    )
    try:
        result: T = retrying.call(call)
    except redis.RedisError as error:
        if transient(error):
            raise RedisUnavailable(f"Redis did not answer within {patience_s:g} s; try again shortly") from error
        raise
    return result
