"""Redis from a URL: TLS, Sentinel, time-outs, and retries that are safe because every transition may be sent twice."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool
from retrying import Retrying

from common.errors import ConfigurationError, RedisUnavailable
from common.settings import mask_url

T = TypeVar("T")
Client: TypeAlias = redis.Redis
Script: TypeAlias = tuple[str, str]  # its source, and the SHA-1 by which Redis knows it
Command: TypeAlias = Sequence[str | float]
Send: TypeAlias = Callable[[Sequence[Command]], tuple[list[Any], str]]  # as `exchange` does
Connected: TypeAlias = Callable[[str, Send], None]

FOREVER = float("inf")  # a patience
FIRST_WAIT_MS = 25  # between the first two tries; doubles from there
LONGEST_WAIT_MS = 1_000
RESUBSCRIBE_WAIT_S = 0.1
LISTEN_S = 1.0  # a subscription that is silent for so long is asked whether it is still there
ASK_SENTINEL_S = 1.0
POOL_SIZE = 64  # connections; more callers than that wait for one

# at the beginning, or where Redis 6 has it when a command inside a script was refused
_BUSY = re.compile(r"(?:^|: -)(?:LOADING|MISCONF|MASTERDOWN|TRYAGAIN|BUSY|UNBLOCKED|OOM|READONLY|NOREPLICAS) ")
# and those that redis-py knows by a class of their own, some of which it robs of their first word
_PASSING = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.NoPermissionError,
    redis.exceptions.TryAgainError,
    redis.exceptions.MasterDownError,
)
_HISTORY = re.compile(r"master_replid:(\w+)")


class NotYet(redis.ConnectionError):
    """Raised for a call that is to wait until Redis has been told what it may have forgotten."""


def connect(
    url: str,
    *,
    timeout_s: float,
    decode: bool = True,
    pool_size: int = POOL_SIZE,
    connected: Connected | None = None,
) -> Client:
    """Return a client for redis://, rediss://, unix:// or redis+sentinel://host:port,host:port/service/db.

    The client itself never re-sends a command: `patiently` does, so that the number of tries is decided in one place.
    `connected` is called for each new connection before its first use: with the name that Redis gives the history of
    its data, another one after each restart and failover, and with a way to send something first.
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
    pool = {"max_connections": pool_size, "timeout": timeout_s}
    try:
        if url.startswith(("redis+sentinel://", "rediss+sentinel://")):
            client = _from_sentinel(url, options, pool)
        else:
            client = redis.Redis(connection_pool=_Pool.from_url(url, **pool, **options))
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"ZFLEET_REDIS_URL {mask_url(url)!r}: {error}") from None
    assert isinstance(client.connection_pool, _Pool)
    client.connection_pool.connected = connected
    return client


def exchange(client: Client, commands: Sequence[Command]) -> tuple[list[Any], str]:
    """Send commands in one go; return their plain replies, errors among them, and the history they were answered from.

    Without redis-py's metrics, which take as long as the command. Raises the first error that is transient.
    """
    pool: Any = client.connection_pool
    connection = pool.get_connection()
    try:
        return _exchange(connection, commands)
    finally:
        pool.release(connection)


def _exchange(connection: Any, commands: Sequence[Command]) -> tuple[list[Any], str]:
    try:
        connection.send_packed_command(connection.pack_commands(commands))
        replies = [_reply(connection) for _ in commands]
        for reply in replies:
            if isinstance(reply, Exception) and transient(reply):
                raise reply  # and connect anew: the next try may find another primary
    except BaseException:
        connection.disconnect()  # Sentinel's connections do not by themselves, and would keep what was not read
        raise
    return replies, getattr(connection, "history", "")


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def run_script(client: Client, script: Script, args: Command) -> tuple[Any, str]:
    """Run a script by its SHA, and by its source where this Redis has not seen it yet; return also the history."""
    source, sha = script
    (reply,), history = exchange(client, [("EVALSHA", sha, 0, *args)])
    if isinstance(reply, redis.exceptions.NoScriptError):
        (reply,), history = exchange(client, [("EVAL", source, 0, *args)])
    if isinstance(reply, Exception):
        raise reply
    return reply, history


def run_scripts(send: Send, calls: Sequence[tuple[Script, Command]]) -> tuple[list[Any], str]:
    """Run scripts in one round trip, in this order; an error that will not pass stands in the place of its reply."""
    loads = [("SCRIPT", "LOAD", source) for source, _ in {script for script, _ in calls}]
    replies, history = send([*loads, *(("EVALSHA", sha, 0, *args) for (_, sha), args in calls)])
    return replies[len(loads) :], history


def hear(client: Client, bells: Sequence[str], timeout_s: float) -> bool:
    """Block until one of these lists has a token, and take it; return whether one had.

    Does not retry: it raises RedisUnavailable at once, and the caller loops anyway.
    """
    try:
        return client.blpop(list(bells), timeout=timeout_s) is not None
    except redis.RedisError as error:
        if transient(error):
            raise RedisUnavailable("Redis went away while waiting for work") from error
        raise


def messages(client: Client, channels: Sequence[str], stop: Callable[[], bool]) -> Iterator[str | None]:
    """Yield what is published, until `stop`; None once a (re-)subscription stands, as things may have been missed.

    It reconnects for ever.
    """
    while not stop():
        subscription: Any = client.pubsub()  # type: ignore[no-untyped-call]
        try:
            subscription.subscribe(*channels)
            yield from _heard(subscription, stop)
        except redis.RedisError as error:
            if not transient(error):
                raise
            time.sleep(RESUBSCRIBE_WAIT_S)
        finally:
            subscription.close()


def _heard(subscription: Any, stop: Callable[[], bool]) -> Iterator[str | None]:
    asked = False
    while not stop():
        message = subscription.get_message(timeout=LISTEN_S)
        if message is not None:
            asked = False
            if message["type"] == "subscribe":
                yield None
            elif message["type"] == "message":
                yield message["data"]
        elif asked:  # a host that vanished closes no connection
            raise redis.TimeoutError("no answer to a ping")
        else:
            subscription.ping()
            asked = True


def allowed(ask: Callable[[], T]) -> T | None:
    """Return what Redis answers, and None where this user may not ask it."""
    try:
        return ask()
    except redis.exceptions.NoPermissionError:
        return None


class _Pool(redis.BlockingConnectionPool):
    """A pool that hands a connection out without first looking whether it is still good.

    redis-py polls the socket before every command, which under gevent costs more than the command. A connection that
    died shows it by an error, and `patiently` sends again; one that was left in the middle of a reply has been closed.
    """

    connected: Connected | None = None

    def make_connection(self) -> Any:
        connection: Any = super().make_connection()  # type: ignore[no-untyped-call]
        look = connection.can_read
        connection.can_read = lambda timeout=0: timeout > 0 and look(timeout)
        if self.connected:
            connection.register_connect_callback(self._ask_history)
        return connection

    def _ask_history(self, connection: Any) -> None:
        (reply,), _ = _exchange(connection, [("INFO", "replication")])
        found = _HISTORY.search(str(reply))
        connection.history = found[1] if found else secrets.token_hex(20)  # unknown is never the same
        try:
            if self.connected:
                self.connected(connection.history, partial(_exchange, connection))
        except BaseException:
            connection.disconnect()
            raise


class _SentinelPool(SentinelConnectionPool, _Pool):
    """The same, of connections to the primary that the Sentinels name; whether it still is the primary is asked again.

    For after a failover, the old primary may take writes for some more seconds, only to forget them when it is demoted.
    """

    _ask_at = 0.0

    def get_connection(self, *_: Any, **__: Any) -> Any:
        now = time.monotonic()
        if now >= self._ask_at:
            self._ask_at = now + ASK_SENTINEL_S
            try:
                self.get_master_address()  # type: ignore[no-untyped-call]  # closes idle ones to another
            except redis.RedisError:  # Sentinels that are away are no reason not to use what we have
                self._ask_at = now + ASK_SENTINEL_S * 10
        return super().get_connection()  # type: ignore[no-untyped-call]

    def owns_connection(self, connection: Any) -> bool:
        """Take back a connection that is not to the primary as well, closed: to drop it, as redis-py does, leaks it."""
        if self.master_address != (connection.host, connection.port):
            connection.disconnect()
        return True


def _from_sentinel(url: str, options: dict[str, Any], pool: Mapping[str, Any]) -> Client:
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
    # one try at each Sentinel, or a dead one would hold up every connection for seconds
    asking = {name: options[name] for name in ("socket_timeout", "socket_connect_timeout", "retry", "driver_info")}
    untyped: Any = Sentinel  # redis-py gives this class no types
    client: Client = untyped(nodes, sentinel_kwargs=asking, **options).master_for(
        service,
        connection_pool_class=_SentinelPool,
        db=int(database or 0),
        username=unquote(user) or None,
        password=unquote(password) or None,
        **pool,
    )
    return client


def transient(error: BaseException) -> bool:
    """Whether the same command may succeed a little later: Redis is away, loading, failing over or refusing writes."""
    if isinstance(error, _PASSING):
        return True
    return isinstance(error, redis.ResponseError) and _BUSY.search(str(error)) is not None


def _remedy(error: redis.RedisError, patience_s: float) -> str:
    if isinstance(error, redis.AuthenticationError | redis.exceptions.NoPermissionError):
        return "Redis refuses this user or password; correct ZFLEET_REDIS_URL, or the user's rights on Redis"
    if isinstance(error, redis.ResponseError):
        return "Redis refuses writes for now (its disk or memory is full, or it is failing over); try again shortly"
    return f"Redis did not answer within {patience_s:g} s; try again shortly"


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
            raise RedisUnavailable(_remedy(error, patience_s)) from error
        raise
    return result
