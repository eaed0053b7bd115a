"""API keys: what a key is, what it allows, and how one is told from a forgery."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple

from pydantic import AwareDatetime, Field, StringConstraints, field_validator

from common.schemas import PRIORITIES, Priority, Stored, Wire

OPEN_TENANT = "default"  # whose tasks are those of a fleet without keys
EVERYBODY = "*"  # stands for all tenants, and is no tenant's name
SECRET_BYTES = 32
SHARES = (0.01, 100.0)  # the least and the largest that a tenant may have

TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")  # a part of queue names
RATE = re.compile(r"[1-9][0-9]{0,5}/[smhd]")  # submits a second, minute, hour, day
KEY_ID = re.compile(r"[0-9a-f]{12}")

Tenant = Annotated[str, StringConstraints(pattern=f"^{TENANT.pattern}$")]
Rate = Annotated[str, StringConstraints(pattern=f"^{RATE.pattern}$")]

KeyState = Literal["active", "retiring", "revoked", "expired"]

_TOKEN = re.compile(rf"zfk_({KEY_ID.pattern})_([0-9a-f]{{64}})")


class ApiKey(Stored):
    """One key of a tenant, as Redis holds it: the secret itself is nowhere, only its SHA-256."""

    key_id: str
    tenant: Tenant
    digest: str
    admin: bool = False  # sees and steers the whole fleet, every tenant's tasks among it
    priority_max: Priority = "high"
    rate: Rate | None = None  # of submits and uploads
    max_queued: Annotated[int, Field(ge=1)] | None = None  # tasks of this key that stand in line
    max_running: Annotated[int, Field(ge=1)] | None = None  # tasks of this key on GPUs; others of it wait
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None  # one still to come: the key was rotated, and works until then

    def works(self, now: datetime) -> bool:
        """Return whether the key is neither revoked nor expired."""
        return all(end is None or now < end for end in (self.revoked_at, self.expires_at))

    def state(self, now: datetime) -> KeyState:
        """Return how the key is, in a word; one that is `retiring` was rotated and works a while longer."""
        if self.revoked_at is not None and self.revoked_at <= now:
            return "revoked"
        if not self.works(now):
            return "expired"
        return "active" if self.revoked_at is None else "retiring"

    def retired(self, at: datetime) -> ApiKey:
        """Return the key as one that is revoked at this time, unless it is even sooner."""
        return self.model_copy(update={"revoked_at": min(at, self.revoked_at or at)})

    def follower(self, token: Token, at: datetime) -> ApiKey:
        """Return a key with these limits and this token, made now, that lasts as long as this one was made for."""
        most = datetime.max.replace(tzinfo=UTC) - at
        expires_at = self.expires_at and at + min(self.expires_at - self.created_at, most)
        changes = {"key_id": token.key_id, "digest": token.digest, "created_at": at, "expires_at": expires_at}
        return self.model_copy(update=changes)

    def allows(self, priority: Priority) -> bool:
        """Return whether tasks of this priority may be submitted with it."""
        return PRIORITIES.index(priority) >= PRIORITIES.index(self.priority_max)


class NewKey(Wire):
    """What a key is to be."""

    tenant: Tenant
    admin: bool = Field(default=False, strict=True, description="Whether it sees and steers the whole fleet.")
    priority_max: Priority = Field(default="high", description="The highest that its tasks may have.")
    rate: Rate | None = Field(default=None, description="Of submits and uploads, as 10/s; units are s, m, h, d.")
    max_queued: Annotated[int, Field(ge=1, strict=True)] | None = Field(default=None, description="Its tasks in line.")
    max_running: Annotated[int, Field(ge=1, strict=True)] | None = Field(default=None, description="Its tasks on GPUs.")
    share: Annotated[float, Field(ge=SHARES[0], le=SHARES[1], allow_inf_nan=False, strict=True)] | None = Field(
        default=None, description="The tenant's part of the GPUs against others' (1), whatever key; null: as it is."
    )
    expires_at: AwareDatetime | None = None

    @field_validator("expires_at", mode="before")
    @classmethod
    def _is_no_number(cls, value: object) -> object:
        if isinstance(value, int | float) or (isinstance(value, str) and value[4:5] != "-"):
            raise ValueError("must be a time as 2027-01-31T00:00:00Z")
        return value


class KeyView(Wire):
    """A key as operators see it: all but the key itself."""

    key_id: str
    tenant: str
    state: KeyState = Field(description="retiring: it was rotated, and works until revoked_at.")
    admin: bool
    priority_max: Priority
    rate: str | None
    max_queued: int | None
    max_running: int | None
    share: float = Field(description="The tenant's part of the GPUs against others'.")
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, key: ApiKey, shares: Mapping[str, float], now: datetime) -> KeyView:
        """Return how a key is; `shares` are those of the tenants that have another one than 1."""
        shown = {name: getattr(key, name) for name in ApiKey.model_fields if name != "digest"}
        return cls(**shown, share=shares.get(key.tenant, 1.0), state=key.state(now))


class Token(NamedTuple):
    """What a client sends: zfk_<id>_<secret>, with 256 random bits in the secret."""

    key_id: str
    secret: str

    def __str__(self) -> str:
        return f"zfk_{self.key_id}_{self.secret}"

    @property
    def digest(self) -> str:
        """What is stored of the secret."""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    @classmethod
    def new(cls) -> Token:
        return cls(secrets.token_hex(6), secrets.token_hex(SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> Token | None:
        """Return the token that this text is, if it has the form of one."""
        match = _TOKEN.fullmatch(text)
        return cls(match[1], match[2]) if match else None


class MadeKey(NamedTuple):
    """A new key, and what its owner shows, which is nowhere kept."""

    token: Token
    key: ApiKey


def proves(token: Token, key: ApiKey | None) -> bool:
    """Return whether the token is this key's, and the key works now. None, an unknown key, takes as long to compare."""
    known = hmac.compare_digest(token.digest, key.digest if key else "0" * 64)
    return known and key is not None and key.works(datetime.now(UTC))
