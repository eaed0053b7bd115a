"""Beyond loopback only with keys."""

from __future__ import annotations

import socket

import pytest

from common import listening
from common.broker import Broker
from common.errors import ConfigurationError
from common.settings import Settings
from tests.servers import free_port
from tests.tenants import new_key, revoke

INSIDE = ("127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "localhost")
OUTSIDE = (
    "0.0.0.0",
    "::",
    "",
    "0",
    "*",
    "192.0.2.1",
    "10.0.0.1",
    "fe80::1",
    "::ffff:192.0.2.1",
    "no.such.host.invalid",
    "." * 300,
)


@pytest.mark.parametrize("host", INSIDE)
def test_this_machine_alone(host: str, settings: Settings) -> None:
    assert not listening.beyond_loopback(host)
    assert listening.check([host], settings) is None


@pytest.mark.parametrize("host", OUTSIDE, ids=lambda host: host[:24] or "none")
def test_others_too(host: str, settings: Settings) -> None:
    assert listening.beyond_loopback(host)
    with pytest.raises(ConfigurationError, match=r"zfleet keys create .* 127.0.0.1, .* --insecure"):
        listening.check(["127.0.0.1", host], settings)
    assert listening.check([host], settings.model_copy(update={"insecure": True})) is None


def test_a_name_counts_by_all_that_it_resolves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = ["127.0.0.1"]
    answer = lambda *_: [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in addresses]  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", answer)
    assert not listening.beyond_loopback("gateway.example")
    addresses.append("192.0.2.1")
    assert listening.beyond_loopback("gateway.example")


def test_with_a_key_anywhere_even_if_none_works(settings: Settings, broker: Broker) -> None:
    key = new_key(broker)
    assert listening.check(["0.0.0.0"], settings) is None
    revoke(broker, key)
    assert listening.check(["0.0.0.0"], settings) is None


def test_while_redis_is_away_that_is_said(settings: Settings) -> None:
    away = {"redis_url": f"redis://127.0.0.1:{free_port()}/0", "redis_patience_s": 0.1}
    said = listening.check(["0.0.0.0"], settings.model_copy(update=away))
    assert said is not None
    assert "unknown" in said
    assert "nobody is served without one" in said


def test_as_a_process_it_has_an_exit_code(
    settings: Settings, broker: Broker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZFLEET_REDIS_URL", settings.redis_url)
    assert listening.main(["0.0.0.0"]) == 2
    assert capsys.readouterr().err.startswith("zfleet: not listening on '0.0.0.0'")
    new_key(broker)
    assert listening.main(["0.0.0.0"]) == 0
    assert capsys.readouterr().err == ""
