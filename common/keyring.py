"""The API keys of the fleet's tenants on Redis, and the secrets that its gateways share."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from common import keys
from common.apikeys import ApiKey, MadeKey, NewKey, Token
from common.errors import KeyNotActive, UnknownKey
from common.link import Link

NO_SUCH_KEY = "no key has this id"


class Keyring(Link):
    """The part of the broker that knows who may ask. All methods raise RedisUnavailable."""

    def make_key(self, new: NewKey, *, at: datetime) -> MadeKey:
        """Make a key. From the first on, nobody is served without one."""
        token = Token.new()
        fields = new.model_dump(exclude={"share"})
        key = ApiKey(key_id=token.key_id, digest=token.digest, created_at=at, **fields)
        self.put_key(key, new.share)
        return MadeKey(token, key)

    def revoke_key(self, key_id: str) -> ApiKey:
        """Let a key open nothing any more, and return it; raises UnknownKey."""
        key = self.change_key(key_id, lambda key: key.retired(datetime.now(UTC)))
        if key is None:
            raise UnknownKey(NO_SUCH_KEY)
        return key

    def rotate_key(self, key_id: str, grace: timedelta, *, at: datetime) -> MadeKey:
        """Make a key with the limits of another, as lasting as that was made for; that one works for `grace` longer.

        Of two rotations at once one prevails. Raises UnknownKey, and KeyNotActive for one that was rotated or revoked,
        or has expired.
        """
        name, token = keys.API_KEY + key_id, Token.new()

        def write(pipeline: Any) -> ApiKey:
            old = _api_key(pipeline.hget(name, "key"))
            if old is None:
                raise UnknownKey(NO_SUCH_KEY)
            new = old.follower(token, at)
            if (state := old.state(at)) == "active":
                pipeline.multi()
                _put(pipeline, new)
                _put(pipeline, old.retired(at + grace))
            elif not pipeline.exists(keys.API_KEY + new.key_id):  # else this very rotation, whose reply was lost
                raise KeyNotActive(f"key {key_id} is {state} already; make a new one")
            return new

        new: ApiKey = self._patiently(lambda: self._redis.transaction(write, name, value_from_callable=True))
        self._run("unpark", new.key_id)
        return MadeKey(token, new)

    def put_key(self, key: ApiKey, share: float | None = None) -> None:
        """Store a key, new or changed; `share` is what its tenant gets of the GPUs from now on (None: as before)."""

        def write() -> None:
            pipeline = self._redis.pipeline(transaction=True)
            _put(pipeline, key)
            if share is not None:
                pipeline.hset(keys.SHARES, key.tenant, share)
            pipeline.execute()

        self._patiently(write)
        self._run("unpark", key.key_id)

    def change_key(self, key_id: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey | None:
        """Replace a key by what `change` makes of it and return that; None for an unknown key.

        Of two changes at once neither is lost: the later one is made to what the earlier one has left.
        """
        name = keys.API_KEY + key_id

        def write(pipeline: Any) -> ApiKey | None:
            key = _api_key(pipeline.hget(name, "key"))
            changed = key and change(key)
            pipeline.multi()
            if changed:
                pipeline.hset(name, mapping=_hash(changed))
            return changed

        changed: ApiKey | None = self._patiently(lambda: self._redis.transaction(write, name, value_from_callable=True))
        return changed

    def key(self, key_id: str) -> ApiKey | None:
        """Return a key by its id, revoked and expired ones too; None for an unknown one."""
        text: str | None = self._patiently(lambda: self._redis.hget(keys.API_KEY + key_id, "key"))
        return _api_key(text)

    def all_keys(self) -> list[ApiKey]:
        """Return every key, revoked and expired ones too, by tenant and age."""

        def read() -> list[str | None]:
            pipeline = self._redis.pipeline(transaction=False)
            for key_id in self._redis.smembers(keys.API_KEYS):
                pipeline.hget(keys.API_KEY + key_id, "key")
            found: list[str | None] = pipeline.execute()
            return found

        known = [key for text in self._patiently(read) if (key := _api_key(text))]
        return sorted(known, key=lambda key: (key.tenant, key.created_at))

    def guarded(self) -> bool:
        """Return whether any key was ever made here: then nobody is served without one, even if all are revoked."""
        return self._patiently(lambda: bool(self._redis.exists(keys.API_KEYS)))

    def shares(self) -> dict[str, float]:
        """Return each tenant's share of the GPUs where it is not 1."""
        found: dict[str, str] = self._patiently(lambda: self._redis.hgetall(keys.SHARES))
        return {tenant: float(share) for tenant, share in found.items()}

    def shared_secret(self, purpose: str) -> bytes:
        """Return 32 random bytes that every process of this fleet gets alike; made at first use."""

        def read() -> str:
            self._redis.hsetnx(keys.SECRETS, purpose, secrets.token_hex(32))
            found: str = self._redis.hget(keys.SECRETS, purpose)
            return found

        return bytes.fromhex(self._patiently(read))


def _put(pipeline: Any, key: ApiKey) -> None:
    pipeline.hset(keys.API_KEY + key.key_id, mapping=_hash(key))
    pipeline.sadd(keys.API_KEYS, key.key_id)


def _hash(key: ApiKey) -> dict[str, str | int]:
    return {"key": key.model_dump_json(), "max_running": key.max_running or ""}


def _api_key(text: str | None) -> ApiKey | None:
    try:
        return ApiKey.model_validate_json(text) if text else None
    except ValidationError:  # by a version too far from this one: it opens nothing here
        return None
