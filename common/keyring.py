"""The API keys of the fleet's tenants on Redis, and the secrets that its gateways share."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from common import keys
from common.apikeys import ApiKey
from common.link import Link


class Keyring(Link):
    """The part of the broker that knows who may ask. All methods raise RedisUnavailable."""

    def put_key(self, key: ApiKey, share: float | None = None) -> None:
        """Store a key, new or changed; `share` is what its tenant gets of the GPUs from now on (None: as before)."""

        def write() -> None:
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.hset(keys.API_KEY + key.key_id, mapping=_hash(key))
            pipeline.sadd(keys.API_KEYS, key.key_id)
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


def _hash(key: ApiKey) -> dict[str, str | int]:
    return {"key": key.model_dump_json(), "max_running": key.max_running or ""}


def _api_key(text: str | None) -> ApiKey | None:
    try:
        return ApiKey.model_validate_json(text) if text else None
    except ValidationError:  # by a version too far from this one: it opens nothing here
        return None
