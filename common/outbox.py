"""What webhooks are told: deliveries on their way out, and the secrets that sign them.

A delivery is lined up by the very transition that starts or ends its task, so that none is forgotten. It lives in its
task's record; RQ's keys show the same to RQ's tools.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from common import keys
from common.connection import hear
from common.link import BELL_WAIT_S, Link
from common.records import Errand, Errands, Stray, WebhookSecrets, errand

TRIES = 10
SECRET_OVERLAP_S = 24 * 3600.0  # the old secret goes on signing beside a new one

TryOutcome = Literal["delivered", "failed", "again", "back"]


class Outbox(Link):
    """The part of the broker that couriers work with. All methods raise RedisUnavailable."""

    def take_deliveries(
        self, courier: str, room: int, under_way: Mapping[str, int], *, most: int, lease_s: float
    ) -> Errands:
        """Take up to `room` deliveries, of the tenants in turn; none of a tenant has more than `most` under way.

        `under_way` is how many the courier has of each tenant. A lease that runs out is a try that failed.
        """
        flat = [part for tenant, count in under_way.items() for part in (tenant, count)]
        left, *rows = self._run(
            "deliver_take", courier, secrets.token_hex(8), room, most, TRIES, int(lease_s * 1000), self._retention_ms,
            *flat,
        )  # fmt: skip
        return Errands([errand(row) for row in rows], bool(left))

    def wait_for_deliveries(self, timeout_s: float = BELL_WAIT_S) -> bool:
        """Block until something has come into line, a second at most; return whether it has.

        Raises RedisUnavailable at once, without another try.
        """
        return hear(self._bell, [keys.DELIVER_BELL], timeout_s)

    def settle_delivery(
        self,
        courier: str,
        errand: Errand,
        outcome: TryOutcome,
        *,
        status: int | None = None,
        error: str = "",
        pause_s: float = 0.0,
    ) -> Literal["ok", "lost"]:
        """End a try: `delivered`, `failed` for good, `again` after the pause, or given `back` as if it had not been."""
        answer: Literal["ok", "lost"] = self._run(
            "deliver_settle", errand.delivery_id, courier, errand.fence, outcome, "" if status is None else status,
            error, int(pause_s * 1000), self._retention_ms,
        )  # fmt: skip
        return answer

    def mend_deliveries(self, every_s: float = 0.0) -> list[Stray]:
        """Put back every delivery that should stand in its queue and does not; return these.

        Does nothing if anybody did it less than `every_s` ago.
        """
        return [Stray(*row) for row in self._run("deliver_mend", int(every_s * 1000))]

    def webhook_secrets(self, tenant: str) -> WebhookSecrets:
        """Return what a tenant's deliveries are signed with; made at first use."""
        purpose = _purpose(tenant)

        def read() -> tuple[str, str | None]:
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.hsetnx(keys.SECRETS, purpose, secrets.token_hex(32))
            pipeline.hmget(keys.SECRETS, purpose, purpose + keys.SECRET_BEFORE)
            current, before = pipeline.execute()[1]
            return current, before

        current, before = self._patiently(read)
        previous, _, until_ms = (before or "").partition(" ")
        if not previous or int(until_ms) / 1000 <= time.time():
            return WebhookSecrets(bytes.fromhex(current))
        until = datetime.fromtimestamp(int(until_ms) / 1000, UTC)
        return WebhookSecrets(bytes.fromhex(current), bytes.fromhex(previous), until)

    def rotate_webhook_secret(self, tenant: str) -> WebhookSecrets:
        """Give a tenant a new secret, and return what is signed with from now on."""
        self._run("rotate_secret", _purpose(tenant), secrets.token_hex(32), int(SECRET_OVERLAP_S * 1000))
        return self.webhook_secrets(tenant)


def _purpose(tenant: str) -> str:
    return f"webhook:{tenant}"
