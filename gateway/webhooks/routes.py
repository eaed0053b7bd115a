"""A tenant's webhook secret: told to it, and replaced when it asks for that."""

from __future__ import annotations

from datetime import datetime

from flask import Response
from pydantic import Field

from common.broker import Broker
from common.errors import RedisUnavailable
from common.records import WebhookSecrets
from common.schemas import Wire
from gateway import problems
from gateway.admission import caller
from gateway.api import NO_STORE, Api, json_answer
from gateway.webhooks.signing import shown


class WebhookSecret(Wire):
    """What a tenant's receivers verify signatures with."""

    secret: str = Field(description="`whsec_` and base64, as Standard Webhooks libraries take it.")
    previous_until: datetime | None = Field(description="Until then the secret before this one signs as well.")


def create(broker: Broker) -> Api:
    """Return the routes."""
    api = Api("webhooks", __name__, about="How to tell that a webhook comes from here.")
    away = problems.documented(RedisUnavailable)

    @api.get("/api/webhooks/secret", responses={"200": WebhookSecret, **away})
    def secret() -> Response:
        """Tell your webhook secret; it is made when you first ask, or are first told something."""
        return _answer(broker.webhook_secrets(caller().tenant))

    @api.post("/api/webhooks/secret/rotate", responses={"200": WebhookSecret, **away})
    def rotate() -> Response:
        """Replace your webhook secret. For 24 hours webhooks are signed with both, so that no receiver misses any."""
        return _answer(broker.rotate_webhook_secret(caller().tenant))

    return api


def _answer(secrets: WebhookSecrets) -> Response:
    told = WebhookSecret(secret=shown(secrets.current), previous_until=secrets.previous_until)
    return json_answer(told, headers=NO_STORE)
