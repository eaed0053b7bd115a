"""The processes that are measured: a Redis, a gateway, and one worker at a time, each known by its process id."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import redis

from common.broker import Broker
from common.settings import Settings, child_environment, load_settings
from zfleet import redis_server
from zfleet.processes import Child, Guardian

ROOT = Path(__file__).resolve().parents[1]
GUNICORN = [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gateway" / "gunicorn_conf.py")]
HOST = "127.0.0.1"
MODEL = "simulated"
START_S = 30.0
POLL_S = 0.02
REDIS_RANK, GATEWAY_RANK, WORKER_RANK = range(3)  # stopped from the highest down

T = TypeVar("T")


class NotUp(Exception):
    """Raised when a process that is to be measured does not start; the text has the end of its output."""


class Fleet:
    """Processes that live as long as the `with` block, with everything they write in one folder."""

    def __init__(self, folder: Path, *, image_ms: float) -> None:
        self.folder = folder
        self.settings: Settings = load_settings(
            {
                "redis_url": f"redis://{HOST}:{_free_port()}/0",
                "data_dir": folder / "data",
                "log_dir": folder / "logs",
                "models": (MODEL,),
                "devices": "cpu",
                "workers_per_device": 1,
                "simulated_image_ms": image_ms,
                "host": HOST,
                "storage": "local",
                "x_accel": "",
                "queue_cap": 1_000_000,  # submits are to be measured, not refusals
            }
        )
        self._ended = contextlib.ExitStack()
        self._guardian: Guardian | None = None

    def __enter__(self) -> Fleet:
        self.settings.data_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._guardian = Guardian()  # should we be killed, it stops what we started
            self._ended.callback(self._guardian.close)
            folder = self.folder / "redis"
            folder.mkdir()
            self._redis_url = self.settings.redis_url
            port = int(self._redis_url.rpartition(":")[2].partition("/")[0])
            command = redis_server.command(redis_server.find(), port, folder)
            server = self._ended.enter_context(self._running("redis", command, rank=REDIS_RANK, cwd=folder))
            self.redis_pid = server.pid
            self.redis: Any = redis.Redis.from_url(self.settings.redis_url, decode_responses=True)
            self._ended.callback(self.redis.close)
            _await("Redis", lambda: _answers(self.redis))
            self.broker = Broker(self.settings)
            self._ended.callback(self.broker.close)
        except BaseException:
            self._ended.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.close()

    @contextlib.contextmanager
    def gateway(self, app: str = "gateway.wsgi:app", *, processes: int = 1) -> Iterator[Gateway]:
        """Run gunicorn, configured as the gateway's, with the gateway or another application."""
        port = _free_port()
        name = app.partition(":")[0]
        env = {"ZFLEET_PORT": str(port), "ZFLEET_GATEWAY_WORKERS": str(processes)}
        with self._running(name, [*GUNICORN, app], rank=GATEWAY_RANK, **env) as child:
            _await(name, lambda: _listens(port) and len(psutil.Process(child.pid).children()) == processes, child)
            yield Gateway(port, *(each.pid for each in psutil.Process(child.pid).children()))

    @contextlib.contextmanager
    def worker(self, *, clock: Path | None = None, plain_sleep: bool = False, stub: bool = False) -> Iterator[int]:
        """Run the supervisor and its one worker; yields the worker's process id once it waits for work.

        With a `clock`, run a worker without supervisor that writes to that file when each picture's first step begins;
        `plain_sleep` makes its steps sleep their full time instead of keeping a schedule (see clocked_worker.py).
        `stub`: one that makes no pictures (see stub_worker.py).
        """
        command = [sys.executable, "-m", "worker"]
        if clock:
            mode = "plain" if plain_sleep else "scheduled"
            command = [sys.executable, "-m", "bench.clocked_worker", str(clock), mode]
        if stub:
            command = [sys.executable, "-m", "bench.stub_worker"]
        with self._running("worker", command, rank=WORKER_RANK) as child:
            up = _await("worker", lambda: [c for c in self.broker.workers() if c.state != "loading"], child)
            pid = up[0].pid
            time.sleep(0.3)  # it is ready a moment before it asks for work
            try:
                yield pid
            finally:
                child.stop()
                for card in self.broker.workers():  # not all of them have a supervisor to do so
                    self.broker.reap(card.name)

    @contextlib.contextmanager
    def process(self, name: str, command: Sequence[str]) -> Iterator[Child]:
        """Run another process with the fleet's environment."""
        with self._running(name, command, rank=WORKER_RANK) as child:
            yield child

    @contextlib.contextmanager
    def _running(
        self, name: str, command: Sequence[str], *, rank: int, cwd: Path = ROOT, **env: str
    ) -> Iterator[Child]:
        child = Child(
            name, command, env=child_environment(self.settings, PYTHONPATH=str(ROOT), **env), cwd=cwd,
            output=self.folder / f"{name}.out", rank=rank, grace_s=10.0,
        )  # fmt: skip
        child.start()
        assert self._guardian
        self._guardian.watch(child)
        try:
            yield child
        finally:
            child.stop()
            self._guardian.forget(child.pid)


class Gateway:
    """A gunicorn, with one worker process unless there are more."""

    def __init__(self, port: int, pid: int, *others: int) -> None:
        self.port = port
        self.pid = pid  # the process that serves, not gunicorn's parent
        self.pids = (pid, *others)


def _await(name: str, check: Callable[[], T], child: Child | None = None) -> T:
    until = time.monotonic() + START_S
    while not (value := check()):
        if time.monotonic() > until or (child and not child.running):
            raise NotUp(f"{name} does not come up: " + " | ".join(child.tail(5) if child else []))
        time.sleep(POLL_S)
    return value


def _answers(client: Any) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
