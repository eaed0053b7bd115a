"""Rates, counted on a real Redis by its own clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.broker import Broker
from common.errors import RedisUnavailable
from common.settings import Settings
from tests.servers import RedisServer


@pytest.mark.parametrize(("rate", "every_s"), [("3/m", 20), ("3/h", 1200), ("3/d", 28_800)])
def test_a_burst_of_a_periods_worth_and_then_evenly(broker: Broker, rate: str, every_s: float) -> None:
    tallies = [broker.count("k", rate) for _ in range(4)]
    assert [(tally.limited, tally.remaining) for tally in tallies] == [(False, 2), (False, 1), (False, 0), (True, 0)]
    assert {tally.limit for tally in tallies} == {3}
    assert tallies[0].reset_s == pytest.approx(every_s, abs=5)
    assert tallies[3].retry_after_s == pytest.approx(every_s, abs=5)
    assert not broker.count("another", rate).limited


def test_a_second_is_the_shortest_period(broker: Broker) -> None:
    assert not broker.count("k", "2/s").limited
    time.sleep(1.0)
    tally = broker.count("k", "2/s")
    assert (tally.limited, tally.limit, tally.remaining) == (False, 2, 1)
    assert tally.reset_s == pytest.approx(0.5)


def test_it_is_kept_with_the_fleets_keys_and_goes_by_itself(broker: Broker, redis_server: RedisServer) -> None:
    broker.count("k", "1/m")
    (name,) = redis_server.client.keys("*")
    assert name.startswith("zf:rates:")
    assert 0 < redis_server.client.ttl(name) <= 60


def test_gateways_share_a_count_and_survive_a_redis_that_forgot_the_script(
    broker: Broker, settings: Settings, redis_server: RedisServer
) -> None:
    other = Broker(settings)
    assert not broker.count("k", "2/h").limited
    assert not other.count("k", "2/h").limited
    redis_server.client.script_flush()
    assert broker.count("k", "2/h").limited
    other.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


def test_without_redis_nobody_is_let_through(own_redis: RedisServer, settings: Settings) -> None:
    broker = Broker(settings.model_copy(update={"redis_url": own_redis.url}), patience_s=0.2)
    assert not broker.count("k", "1/h").limited
    own_redis.kill()
    with pytest.raises(RedisUnavailable):
        broker.count("k", "1/h")
    own_redis.start()
    assert broker.count("k", "1/h").limited
    broker.close()
