"""A Redis with the users of deploy/redis/users.acl, and one more for the test itself."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import redis

from tests.servers import RedisServer

USERS = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"
NAMES = ("gateway", "worker", "courier", "operator")


class GuardedRedis(RedisServer):
    """Every user's password is its own name, as the README says to put it in."""

    def __init__(self, folder: Path) -> None:
        placed = re.sub(r"([A-Z]+)_PASSWORD_SHA256", lambda match: _digest(match[1].lower()), USERS.read_text("utf-8"))
        path = folder / "users.acl"
        path.write_text(f"{placed}user tester on >tester ~* &* +@all\n", "utf-8")
        super().__init__(folder, "--aclfile", str(path))
        self.client = redis.Redis(port=self.port, username="tester", password="tester", decode_responses=True)

    def url_of(self, user: str) -> str:
        return f"redis://{user}:{user}@127.0.0.1:{self.port}/0"

    def as_user(self, user: str) -> Any:
        return redis.Redis.from_url(self.url_of(user), decode_responses=True)

    def refused(self) -> list[str]:
        """What its users tried and may not do, each once: user, why, and the command, key or channel."""
        found = {(one["username"], one["reason"], one["object"]) for one in self.client.acl_log(128)}
        return sorted(f"{user} {reason} {thing}" for user, reason, thing in found)


def _digest(password: str) -> str:
    return hashlib.sha256(password.encode()).hexdigest()
