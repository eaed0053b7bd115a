"""A primary, its replica and three Sentinels that watch over them: real processes on loopback, for a test to kill."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Self

import redis

from tests.servers import START_TIMEOUT_S, RedisServer, Server, binary, eventually, free_port

SERVICE = "mymaster"
DOWN_AFTER_MS = 1_000
FAILOVER_TIMEOUT_MS = 5_000


class SentinelServer(Server):
    """One Sentinel."""

    def __init__(self, folder: Path, primary: RedisServer) -> None:
        self.port = free_port()
        folder.mkdir()
        conf = folder / "sentinel.conf"  # it writes there what it learns
        conf.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {SERVICE} {FAILOVER_TIMEOUT_MS}\n"
        )
        super().__init__([binary("redis-server"), str(conf), "--sentinel"], log=folder / "log")
        self.client = redis.Redis(port=self.port, decode_responses=True)

    def sees(self) -> dict[str, str]:
        """What it knows of the primary."""
        with contextlib.suppress(redis.ConnectionError):
            return dict(self.client.sentinel_master(SERVICE))
        return {}


class Watched:
    """The whole of it. `primary` and `replica` are what they were at the start."""

    def __init__(self, folder: Path) -> None:
        for name in ("primary", "replica"):
            (folder / name).mkdir()
        self.primary = RedisServer(folder / "primary")
        self.replica = RedisServer(folder / "replica", "--replicaof", "127.0.0.1", str(self.primary.port))
        self.sentinels = [SentinelServer(folder / f"sentinel{number}", self.primary) for number in range(3)]
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{hosts}/{SERVICE}/0"

    def leads(self, server: RedisServer) -> bool:
        """Whether most Sentinels send clients to this server, and it is ready for them."""
        agreed = sum(sentinel.sees().get("port") == server.port for sentinel in self.sentinels)
        return agreed >= 2 and _replication(server).get("role") == "master"

    def followed_by(self, server: RedisServer) -> bool:
        """Whether this server is a replica that has caught up."""
        return _replication(server).get("master_link_status") == "up"

    def lose_touch(self) -> None:
        """From now on the replica, which must be stopped, hears nothing of what the primary is told."""
        self.primary.client.client_kill_filter(_type="replica")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for server in (self.primary, self.replica, *self.sentinels):
                stack.enter_context(server)
            eventually(self._complete, within_s=START_TIMEOUT_S)
            stack.pop_all()  # from here on __exit__ ends them
        return self

    def __exit__(self, *_: object) -> None:
        for server in (*self.sentinels, self.replica, self.primary):
            server.kill()

    def _complete(self) -> bool:
        views = [sentinel.sees() for sentinel in self.sentinels]
        known = all(view.get("num-slaves") == 1 and view.get("num-other-sentinels") == 2 for view in views)
        return known and self.followed_by(self.replica)


def _replication(server: RedisServer) -> dict[str, object]:
    with contextlib.suppress(redis.RedisError):
        return dict(server.client.info("replication"))
    return {}
