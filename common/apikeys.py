"""API keys: what a key is, what it allows, and how one is told from a forgery."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, StringConstraints

from common.schemas import PRIORITIES, Priority, Stored

OPEN_TENANT = "default"  # whose tasks are those of a fleet without keys
EVERYBODY = "*"  # stands for all tenants, and is no tenant's name
SECRET_BYTES = 32

TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")  # a part of queue names
RATE = re.compile(r"[1-9][0-9]{0,5}/[smhd]")  # submits a second, minute, hour, day
KEY_ID = re.compile(r"[0-9a-f]{12}")

Tenant = Annotated[str, StringConstraints(pattern=rf"\A{TENANT.pattern}\z")]
Rate = Annotated[str, StringConstraints(pattern=rf"\A{RATE.pattern}\z")]

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

    def state(self, now: datetime) -> Literal["active", "retiring", "revoked", "expired"]:
        """Return how the key is, in a word; one that is `retiring` was rotated and works a while longer."""
        if self.revoked_at is not None and self.revoked_at <= now:
            return "revoked"
        if not self.works(now):
            return "expired"
        return "active" if self.revoked_at is None else "retiring"

    def retired(self, at: datetime) -> ApiKey:
        """Return the key as one that is revoked at this time, unless it is even sooner."""
        return self.model_copy(update={"revoked_at": min(at, self.revoked_at or at)})

    def allows(self, priority: Priority) -> bool:
        """Return whether tasks of this priority may be submitted with it."""
        return PRIORITIES.index(priority) >= PRIORITIES.index(self.priority_max)


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


def proves(token: Token, key: ApiKey | None) -> bool:
    """Return whether the token is this key's, and the key works now. None, an unknown key, takes as long to compare."""
    known = hmac.compare_digest(token.digest, key.digest if key else "0" * 64)
    return known and key is not None and key.works(datetime.now(UTC))
