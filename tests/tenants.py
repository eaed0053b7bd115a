"""Tenants for tests: keys as `zfleet keys create` makes them, and how they are shown."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from common.apikeys import ApiKey, Token
from common.broker import Broker


def new_key(broker: Broker, tenant: str = "acme", *, lasts_s: float | None = None, **limits: object) -> str:
    """Make a key of this tenant and return it."""
    now, token = datetime.now(UTC), Token.new()
    ends = None if lasts_s is None else now + timedelta(seconds=lasts_s)
    fields = {"key_id": token.key_id, "tenant": tenant, "digest": token.digest, "created_at": now, "expires_at": ends}
    broker.put_key(ApiKey.model_validate(fields | limits))
    return str(token)


def revoke(broker: Broker, key: str) -> None:
    broker.change_key(key.split("_")[1], lambda found: found.retired(datetime.now(UTC)))


def bearer(key: str) -> dict[str, str]:
    """The header that shows a key."""
    return {"Authorization": f"Bearer {key}"}
