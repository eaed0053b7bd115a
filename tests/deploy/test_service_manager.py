"""What the parts of a fleet tell systemd, over a real socket: ready, alive, stopping, and nothing when they hang."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import pytest

from common import servicemanager
from common.broker import Broker
from common.servicemanager import ServiceManager
from common.settings import Settings, child_environment, load_settings
from gateway import gunicorn_conf
from tests.deploy.manager import Manager
from tests.fleet import submit_many
from tests.servers import RedisServer, Server, eventually, free_port

WATCHDOG_S = 1.5  # so a sign of life each 0.5 s, but of the gateway, which looks about each second
PARTS = ("worker", "gateway", "webhooks")


class Part(NamedTuple):
    """A part of the fleet, run by the command of its unit, and what hears of it."""

    server: Server
    manager: Manager


def part(name: str, settings: Settings, folder: Path) -> Part:
    """Not started yet."""
    (folder / name).mkdir()
    manager = Manager(folder / name)
    env = child_environment(settings, **manager.environment(WATCHDOG_S))
    return Part(Server([sys.executable, "-m", "zfleet", name], env=env, log=folder / f"{name}.log"), manager)


@pytest.fixture(scope="module")
def fleet(redis_session: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Part]]:
    """All parts at once. The worker's model takes a while to load."""
    redis_session.flush()
    folder = tmp_path_factory.mktemp("parts")
    settings = load_settings(
        {
            "redis_url": redis_session.url, "data_dir": folder, "models": ("simulated",), "devices": "cpu",
            "port": free_port(), "simulated_load_ms": 1_500.0, "simulated_image_ms": 4_000.0,
        }
    )  # fmt: skip
    parts = {name: part(name, settings, folder) for name in PARTS}
    with contextlib.ExitStack() as stack:
        for server, manager in parts.values():
            stack.enter_context(manager)
            stack.enter_context(server)
        yield parts


def test_a_supervisor_is_ready_once_a_worker_is_and_asks_for_time_until_then(fleet: dict[str, Part]) -> None:
    manager = fleet["worker"].manager
    manager.await_line("EXTEND_TIMEOUT_USEC=30000000")
    ready = manager.await_line("READY=1")
    manager.await_line("STATUS=1 of 1 workers ready")
    waited = [told.at for told in manager.heard("EXTEND_TIMEOUT_USEC=")]
    assert len(waited) > 2 and max(waited) <= ready.at
    assert manager.heard("STATUS=0 of 1 workers ready")[0].at < ready.at - 1.5, "it loaded its model before"


def test_every_part_says_that_it_is_ready_and_that_it_lives_and_nobody_else_speaks(fleet: dict[str, Part]) -> None:
    for name, (server, manager) in fleet.items():
        manager.await_line("READY=1")
        eventually(manager.more("WATCHDOG=1"))
        assert not manager.heard("STOPPING=1")
        assert {told.pid for told in manager.heard("")} == {server.pid}, "NotifyAccess=main hears nobody else"
        if name != "gateway":  # whose children are forks: theirs shows what it was started with
            for child in psutil.Process(server.pid).children(recursive=True):
                assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & child.environ().keys()


def test_what_hangs_is_silent(fleet: dict[str, Part]) -> None:
    for server, manager in fleet.values():
        manager.await_line("READY=1")
        server.signal(signal.SIGSTOP)
    time.sleep(0.3)  # what was under way has come
    still = [manager.more("WATCHDOG=1") for _, manager in fleet.values()]
    time.sleep(WATCHDOG_S)
    assert [more() for more in still] == [False] * 3
    for server, _ in fleet.values():
        server.signal(signal.SIGCONT)
    for more in still:
        eventually(more)


def test_a_gateway_lives_on_when_a_process_of_its_is_replaced(fleet: dict[str, Part]) -> None:
    server, manager = fleet["gateway"]
    manager.await_line("READY=1")
    (worker,) = psutil.Process(server.pid).children()
    worker.kill()
    eventually(lambda: [child.pid for child in psutil.Process(server.pid).children()] not in ([], [worker.pid]))
    eventually(manager.more("WATCHDOG=1"), within_s=30)


def test_what_is_stopped_says_so_and_a_drain_is_given_time(fleet: dict[str, Part], redis_session: RedisServer) -> None:
    manager = fleet["worker"].manager
    manager.await_line("READY=1")
    with contextlib.closing(Broker(load_settings({"redis_url": redis_session.url}))) as broker:
        (task_id,) = submit_many(broker, 1, steps=20)
        eventually(lambda: (record := broker.view(task_id)) and record.step)
    for server, _ in fleet.values():
        server.signal(signal.SIGTERM)
    manager.await_line("STATUS=1 workers drain")
    for sign in ("EXTEND_TIMEOUT_USEC=", "WATCHDOG=1"):
        eventually(manager.more(sign))
    for server, manager in fleet.values():
        assert server.stop() == 0
        assert [told.line for told in manager.heard("STOPPING=1")] == ["STOPPING=1"]
        assert len(manager.heard("READY=1")) == 1


def test_a_gateway_is_well_only_while_a_process_of_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(ServiceManager):
        said: list[str] = []  # noqa: RUF012

        def _tell(self, *lines: str) -> None:
            self.said += lines

    monkeypatch.setattr(gunicorn_conf, "manager", Told("somewhere", 0.0))
    updated = [time.time()]  # a process that has not begun
    worker = SimpleNamespace(tmp=SimpleNamespace(last_update=lambda: updated[-1]))
    arbiter = SimpleNamespace(WORKERS={1: worker}, num_workers=1, murder_workers=lambda: None)
    gunicorn_conf.when_ready(arbiter)
    arbiter.murder_workers()
    updated.append(time.monotonic() - gunicorn_conf.timeout - 1)  # one that hangs
    arbiter.murder_workers()
    assert Told.said == []
    updated.append(time.monotonic() - 1)
    arbiter.murder_workers()
    assert Told.said == ["READY=1", "WATCHDOG=1", "STATUS=1 of 1 gateway processes answer"]


def test_an_abstract_address_and_a_manager_that_is_gone() -> None:
    with Manager() as manager:
        service = ServiceManager(manager.address, watchdog_s=30.0)
        service.alive("loading")
        service.ready()
        service.ready()
        service.alive("loading")
        manager.await_line("READY=1")
        lines = [told.line for told in manager.heard("")]
        assert lines == ["WATCHDOG=1", "EXTEND_TIMEOUT_USEC=30000000", "STATUS=loading", "READY=1"]
    service.stopping()  # to nobody, and no error
    ServiceManager().ready()


def test_the_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with Manager() as manager:
        for name, value in {**manager.environment(5.0), "WATCHDOG_PID": "1"}.items():
            monkeypatch.setenv(name, value)
        servicemanager.service_manager.cache_clear()
        servicemanager.service_manager().alive()
        servicemanager.service_manager.cache_clear()
        manager.await_line("EXTEND_TIMEOUT_USEC=")
        assert not manager.heard("WATCHDOG=1")
