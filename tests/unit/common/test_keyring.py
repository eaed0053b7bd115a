"""Keys on Redis: changed at once by several, none of it is lost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from common import keys
from common.apikeys import ApiKey, Token
from common.broker import Broker
from tests.servers import RedisServer
from tests.tenants import new_key

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def key(**changes: object) -> ApiKey:
    fields = {"key_id": "0" * 12, "tenant": "acme", "digest": "0" * 64, "created_at": NOW}
    return ApiKey.model_validate(fields | changes)


def test_a_keys_life() -> None:
    assert [key().state(NOW), key().works(NOW)] == ["active", True]
    lasting = key(expires_at=NOW + HOUR)
    assert [lasting.state(NOW + HOUR * h) for h in (0, 1)] == ["active", "expired"]
    retiring = key().retired(NOW + HOUR)
    assert [retiring.state(NOW + HOUR * h) for h in (0, 1)] == ["retiring", "revoked"]
    assert [retiring.works(NOW + HOUR * h) for h in (0, 1)] == [True, False]
    assert retiring.retired(NOW).revoked_at == NOW
    assert key().retired(NOW).retired(NOW + HOUR).revoked_at == NOW, "no later than it was"


def test_changes_at_once_are_all_made(broker: Broker) -> None:
    key_id = new_key(broker).split("_")[1]

    def longer(found: ApiKey) -> ApiKey:
        return found.model_copy(update={"max_queued": (found.max_queued or 0) + 1})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: broker.change_key(key_id, longer), range(40)))
    found = broker.key(key_id)
    assert found is not None
    assert found.max_queued == 40
    assert broker.change_key("f" * 12, longer) is None
    assert broker.key("f" * 12) is None


def test_a_claim_finds_what_it_needs_of_a_key(broker: Broker, redis_server: RedisServer) -> None:
    key_id = new_key(broker, max_running=3).split("_")[1]
    broker.change_key(key_id, lambda found: found.retired(NOW))
    assert redis_server.client.hget(keys.API_KEY + key_id, "max_running") == "3"


def test_a_key_that_another_version_wrote_opens_nothing(broker: Broker, redis_server: RedisServer) -> None:
    key_id = new_key(broker).split("_")[1]
    redis_server.client.hset(keys.API_KEY + key_id, "key", "{}")
    assert broker.key(key_id) is None
    assert broker.all_keys() == []
    assert broker.guarded()


def test_a_token_is_256_random_bits_and_an_id() -> None:
    tokens = [Token.new() for _ in range(500)]
    assert len({token.secret for token in tokens}) == 500
    assert all(Token.parse(str(token)) == token for token in tokens)
    ones = [sum(int(token.secret, 16) >> bit & 1 for token in tokens) for bit in range(256)]
    assert all(150 < count < 350 for count in ones)
