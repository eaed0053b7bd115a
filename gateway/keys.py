"""API keys over HTTP, for whoever operates the fleet: the same as `zfleet keys`, by the same code."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from flask import Response, request
from pydantic import BaseModel, Field

from common import telemetry
from common.apikeys import KEY_ID, ApiKey, KeyView, MadeKey, NewKey
from common.broker import Broker
from common.errors import (
    Forbidden,
    InvalidRequest,
    KeyNotActive,
    MalformedBody,
    RedisUnavailable,
    Unauthenticated,
    UnknownKey,
    UnsupportedMediaType,
)
from common.schemas import Wire
from gateway import problems
from gateway.admission import caller, is_local, open_to
from gateway.api import NO_STORE, Api, json_answer

GRACE_MAX_S = 366 * 86_400

log = telemetry.get_logger()


class Keys(Wire):
    """GET /api/keys."""

    keys: Sequence[KeyView]


class MadeKeyView(KeyView):
    """A key that was just made. It is shown this once."""

    key: str


class Rotation(Wire):
    """How a key is to be replaced."""

    grace_s: float = Field(
        default=0, ge=0, le=GRACE_MAX_S, allow_inf_nan=False, strict=True,
        description="For how long the old one works on.",
    )  # fmt: skip


class KeyPath(BaseModel):
    """The key that a call is about."""

    key_id: str = Field(description="The 12 digits between zfk_ and the next _.")


def create(broker: Broker) -> Api:
    """Return the routes for API keys."""
    api = Api("keys", __name__, about="API keys: who may use this fleet, and how much.")
    _add_list(api, broker)
    _add_changes(api, broker)
    return api


def _add_list(api: Api, broker: Broker) -> None:
    body = (InvalidRequest, MalformedBody, UnsupportedMediaType, Forbidden, RedisUnavailable)

    @api.get("/api/keys", responses={"200": Keys, **problems.documented(Forbidden, RedisUnavailable)})
    @open_to("admin")
    def keys() -> Response:
        """List all keys with their limits, revoked and expired ones too, but for the keys themselves."""
        shares, now = broker.shares(), datetime.now(UTC)
        found = [KeyView.of(key, shares, now) for key in broker.all_keys()]
        return json_answer(Keys(keys=found), headers=NO_STORE)

    @api.post("/api/keys", responses={"201": MadeKeyView, **problems.documented(*body)})
    @open_to("admin")
    def make(body: NewKey) -> Response:
        """Make a key. The answer shows it, this once.

        The first one is an admin's, and made from the gateway's own machine: from then on nobody is served without.
        """
        now = datetime.now(UTC)
        if body.expires_at is not None and body.expires_at <= now:
            raise InvalidRequest.field("expires_at", "must be still to come")
        if caller().key is None:
            _check_first(broker, body)
        return _show(broker, broker.make_key(body, at=now), 201)


def _add_changes(api: Api, broker: Broker) -> None:
    known = (UnknownKey, Forbidden, RedisUnavailable)
    body = (InvalidRequest, MalformedBody, UnsupportedMediaType, KeyNotActive)

    @api.post("/api/keys/<key_id>/revoke", responses={"200": KeyView, **problems.documented(*known)})
    @open_to("admin")
    def revoke(path: KeyPath) -> Response:
        """Let a key open nothing any more, within two seconds. What was submitted with it goes on."""
        key = broker.revoke_key(_checked(path.key_id))
        log.warning("key_revoked", key=key.key_id, by=caller().key_id)
        return json_answer(_view(broker, key), headers=NO_STORE)

    @api.post("/api/keys/<key_id>/rotate", responses={"200": MadeKeyView, **problems.documented(*known, *body)})
    @open_to("admin")
    def rotate(path: KeyPath, body: Rotation) -> Response:
        """Make a key with the limits of this one, which it replaces. The answer shows it, this once.

        It lasts as long as the old one was made for.
        """
        grace = timedelta(seconds=body.grace_s)
        return _show(broker, broker.rotate_key(_checked(path.key_id), grace, at=datetime.now(UTC)), 200)


def _check_first(broker: Broker, new: NewKey) -> None:
    """Let a caller without a key make the fleet's first one only from here, and only one that can make others."""
    if broker.guarded():  # since this process last looked
        raise Unauthenticated("this call needs an API key: Authorization: Bearer zfk_…")
    if not is_local(request.environ):
        raise Forbidden("the first key is made on the fleet's own machine: zfleet keys create --tenant NAME --admin")
    if not new.admin:
        raise InvalidRequest.field("admin", "must be true for the first key: only such a one can make others")


def _checked(key_id: str) -> str:
    if not KEY_ID.fullmatch(key_id):
        raise UnknownKey("that is no key's id, the 12 digits between zfk_ and the next _")
    return key_id


def _view(broker: Broker, key: ApiKey) -> KeyView:
    return KeyView.of(key, broker.shares(), datetime.now(UTC))


def _show(broker: Broker, made: MadeKey, status: int) -> Response:
    log.warning("key_made", key=made.key.key_id, tenant=made.key.tenant, admin=made.key.admin, by=caller().key_id)
    shown = MadeKeyView(**_view(broker, made.key).model_dump(), key=str(made.token))
    return json_answer(shown, status, NO_STORE)
