"""How the supervisor restarts and gives up; what it does to real children is in tests/faults."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from common.broker import Broker
from common.errors import ConfigurationError, RedisUnavailable
from common.settings import Settings
from tests.conftest import SubmitFn
from worker import supervisor
from worker.supervisor import Slot, Supervisor


@pytest.fixture
def watcher(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """A supervisor whose children exit at once with code 1."""
    real = subprocess.Popen

    def start(_command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-c", "raise SystemExit(1)"], pass_fds=options["pass_fds"])  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(supervisor.subprocess, "Popen", start)  # type: ignore[attr-defined]
    return Supervisor(settings)


def crash(watcher: Supervisor, slot: Slot) -> float:
    """Start the slot's child, let it die, and return how long its successor has to wait."""
    slot.restart_at = 0.0
    watcher._watch(slot)
    assert slot.process is not None
    slot.process.wait()
    before = time.monotonic()
    watcher._watch(slot)
    return round(slot.restart_at - before, 1)


def test_the_first_restart_is_immediate_and_a_crash_loop_backs_off_to_thirty_seconds(watcher: Supervisor) -> None:
    (slot,) = watcher.slots
    assert [crash(watcher, slot) for _ in range(8)] == [0, 1, 2, 4, 8, 16, 30, 30]


def test_a_child_that_lived_long_starts_afresh(watcher: Supervisor) -> None:
    (slot,) = watcher.slots
    for _ in range(4):
        crash(watcher, slot)
    slot.restart_at = 0.0
    watcher._watch(slot)
    assert slot.process is not None
    slot.process.wait()
    slot.started -= supervisor.STEADY_S
    watcher._watch(slot)
    assert slot.restart_at <= time.monotonic()


def test_every_incarnation_has_a_name_of_its_own(watcher: Supervisor) -> None:
    (slot,) = watcher.slots
    names = []
    for _ in range(3):
        crash(watcher, slot)
        names.append(slot.name)
    assert len(set(names)) == 3


def test_a_dead_childs_runs_are_taken_back_even_if_redis_was_away(
    watcher: Supervisor, broker: Broker, submit: SubmitFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slot,) = watcher.slots
    submit()
    reap = watcher._broker.reap

    def away(_worker: str = "") -> list[object]:
        raise RedisUnavailable("away")

    watcher._take_back()
    monkeypatch.setattr(watcher._broker, "reap", away)
    watcher._watch(slot)
    broker.claim(slot.name, "cpu", ["simulated"], 1)
    assert slot.process is not None
    slot.process.wait()
    watcher._watch(slot)
    assert broker.queues()[0].running == 1
    monkeypatch.setattr(watcher._broker, "reap", reap)
    watcher._take_back()
    assert (broker.queues()[0].running, broker.queues()[0].queued) == (0, 1)


def test_after_an_outage_leases_get_a_term_to_be_renewed(watcher: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(watcher._broker, "reap", lambda worker="": calls.append(worker) or [])
    away = [False, True, True, False, False]  # Redis, at each tick

    def probe() -> None:
        if away[0]:
            raise RedisUnavailable("away")

    monkeypatch.setattr(watcher._broker, "probe", probe)
    seen = []
    for is_away in away:
        away[0] = is_away
        if is_away:
            watcher._away = True  # as any call that fails sets it
        watcher._take_back()
        seen.append((watcher._away, watcher._next_reap > time.monotonic() + watcher.settings.lease_s - 1))
    assert seen == [(False, True), (True, True), (True, True), (False, True), (False, True)]
    assert calls == []
    watcher._next_reap = 0.0
    watcher._take_back()
    assert calls == [""]


@pytest.mark.parametrize("changes", [{"models": ("nope",)}, {"devices": "9"}, {"storage": "tape"}])
def test_a_wrong_setting_is_told_before_any_child_starts(settings: Settings, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        Supervisor(settings.model_copy(update=changes))
