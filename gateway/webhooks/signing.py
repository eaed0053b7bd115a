"""The signature that proves who tells a webhook, as standardwebhooks.com has it."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

from standardwebhooks import Webhook

from common.records import Errand, WebhookSecrets

AGENT = "zfleet-webhooks/1.0"
SECRET_PREFIX = "whsec_"


def headers(errand: Errand, secrets: WebhookSecrets, body: str) -> dict[str, str]:
    """Return the headers of this body, signed now with each secret that is good."""
    now = datetime.now(UTC)
    good = [secret for secret in (secrets.current, secrets.previous) if secret]
    return {
        "Content-Type": "application/json",
        "User-Agent": AGENT,
        "webhook-id": errand.delivery_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(errand.delivery_id, now, body) for secret in good),
    }


def shown(secret: bytes) -> str:
    """Return a secret as receivers are given it."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()
