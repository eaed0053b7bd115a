from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from common.broker import Broker
from common.errors import RedisUnavailable
from common.settings import Settings
from common.storage import open_storage
from gateway import traffic
from gateway.traffic import Traffic
from tests.servers import eventually


@pytest.fixture
def counted(broker: Broker, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traffic]:
    """Traffic that tells by itself, often."""
    monkeypatch.setattr(traffic, "TELL_EVERY_S", 0.02)
    counted = Traffic(broker, open_storage(settings))
    counted.start()
    yield counted
    counted.stop()


def test_requests_and_accepted_submits_are_told_by_themselves(counted: Traffic, broker: Broker) -> None:
    counted.answered("/api/submit", "POST", 202, 0.0012)
    counted.answered("/api/submit", "POST", 429, 3.0)
    counted.answered(None, "GET", None, 0.1)
    expected = {
        "requests|/api/submit|POST|202": 1, "requests|/api/submit|POST|429": 1, "requests|unmatched|GET|0": 1,
        "submit|0.0025": 1, "submit|sum": 1200,
    }  # fmt: skip
    eventually(lambda: broker.counts() == expected)
    assert broker.disks(), "and of the disk"


def test_who_has_nothing_new_tells_nothing(counted: Traffic, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    counted.answered("/health", "GET", 200, 0.001)
    eventually(lambda: broker.counts())
    told: list[object] = []
    monkeypatch.setattr(broker, "add_counts", lambda *what: told.append(what))
    time.sleep(0.2)  # ten tellings
    assert told == []
    counted.answered("/health", "GET", 200, 0.001)
    eventually(lambda: told)


@pytest.mark.parametrize("error", [RedisUnavailable("away"), RuntimeError("refused")], ids=["away", "refused"])
def test_what_goes_wrong_keeps_nothing_from_being_told_later(
    counted: Traffic, broker: Broker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(broker, "add_counts", fail)
        counted.answered("/health", "GET", 200, 0.001)
        time.sleep(0.1)
        assert broker.counts() == {}
    eventually(lambda: broker.counts() == {"requests|/health|GET|200": 1})


def test_a_stop_tells_what_is_left(broker: Broker, settings: Settings) -> None:
    counted = Traffic(broker, open_storage(settings))
    counted.answered("/health", "GET", 200, 0.001)
    counted.stop()
    assert broker.counts() == {"requests|/health|GET|200": 1}
