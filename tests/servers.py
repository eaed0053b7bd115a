"""Real servers for the tests, each on a free port of loopback, each stopped by the id it was started with."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
import redis

from common.settings import Settings, child_environment

START_TIMEOUT_S = 30.0
PACKAGES = {
    "ip": "iproute2",
    "cc": "gcc",
    "promtool": "prometheus",
    "kubectl": "kubernetes-client",
}  # Debian's, where the package is not called like the program


_given: set[int] = set()


def free_port() -> int:
    """Return a port of loopback that nobody listens on, another one each time."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port


def eventually(check: Callable[[], object], *, within_s: float = 30.0, every_s: float = 0.02) -> None:
    """Wait until `check` returns something true; fails the test with its last value after `within_s`."""
    until = time.monotonic() + within_s
    while not (value := check()):
        if time.monotonic() > until:
            pytest.fail(f"not within {within_s} s: last {value!r}")
        time.sleep(every_s)


def binary(name: str) -> str:
    """Return the path of a server program; a missing one is a failure, never a skip."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.fail(f"{name} is not installed; `make test` installs it, or: apt-get install {PACKAGES.get(name, name)}")
    return path


class Server:
    """A child process that is running between start and stop."""

    def __init__(self, command: list[str], *, env: Mapping[str, str] | None = None, log: Path | None = None) -> None:
        self.command = command
        self.env = dict(env) if env is not None else None
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> Self:
        with (self.log or Path(os.devnull)).open("ab") as output:
            self.process = subprocess.Popen(
                self.command, env=self.env, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        return self

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self, timeout_s: float = 40.0) -> int:
        """SIGTERM, and return the exit code; a server that does not go is killed and the test failed."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"did not stop within {timeout_s} s of SIGTERM: {self.command[:4]}")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()


class RedisServer(Server):
    """A redis-server with AOF in its own folder; started again after `kill` it has the same port and data."""

    def __init__(self, folder: Path, *options: str) -> None:
        """`options` go last, so that they prevail."""
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        command = [
            binary("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder),
            "--appendonly", "yes", "--appendfsync", "everysec", "--save", "",
            *options,
        ]  # fmt: skip
        super().__init__(command, log=folder / "redis.log")
        self._folder = folder
        self.client = redis.Redis(port=self.port, decode_responses=True)

    def start(self) -> Self:
        super().start()
        eventually(self._answers, within_s=START_TIMEOUT_S)
        return self

    def flush(self) -> None:
        self.client.flushall()

    def written(self) -> int:
        """How long the file is to which it appends its writes."""
        return self._writes().stat().st_size

    def forget(self, written: int) -> None:
        """Cut that file back to this length, as a power cut does. Only while it does not run."""
        os.truncate(self._writes(), written)

    def _writes(self) -> Path:
        (path,) = self._folder.rglob("appendonly.aof*.incr.aof")
        return path

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False


class WorkerServer(Server):
    """A supervisor with its workers, as `python -m worker`."""

    def __init__(self, settings: Settings, log: Path) -> None:
        super().__init__([sys.executable, "-m", "worker"], env=child_environment(settings), log=log)


class GatewayServer(Server):
    """A gunicorn with the gateway on a free port."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        env = child_environment(settings, ZFLEET_PORT=str(self.port), ZFLEET_HOST="127.0.0.1")
        config = Path(__file__).parents[1] / "gateway" / "gunicorn_conf.py"
        super().__init__([sys.executable, "-m", "gunicorn", "-c", str(config), "gateway.wsgi:app"], env=env, log=log)
