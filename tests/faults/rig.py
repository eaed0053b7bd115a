"""A whole fleet to throw faults at: its own Redis, a gateway, supervisors with short leases, a ledger outside of it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest
import requests

from common.broker import Broker
from common.cards import WorkerCard
from common.settings import Settings, load_settings
from tests.faults.books import Ledger, Load, Report, audit
from tests.fleet import ready_workers
from tests.servers import GatewayServer, RedisServer, Server, WorkerServer, eventually

LONG = os.environ.get("ZFLEET_FAULTS") == "long"
LEASE_S = 2.0
BEAT_S = 0.4
START_S = 40.0
SABOTAGE = Path(__file__).parent / "sabotage"
ROOT = Path(__file__).parents[2]
NORMAL_AGAIN_S = 15.0  # after an outage of Redis, gateway and workers answer and work again within this


class Rig:
    """The fleet between `with` and the end of the block; what is still running then is killed.

    `changes` are settings. No supervisor is started by itself: see `supervise`.
    """

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        redis_folder = folder / "redis"
        redis_folder.mkdir()
        self.redis = RedisServer(redis_folder)
        self.settings: Settings = load_settings(
            {
                "redis_url": self.redis.url,
                "data_dir": folder / "data dir",
                "models": ("simulated",),
                "devices": "cpu",
                "workers_per_device": 2,
                "simulated_image_ms": 200.0,
                "lease_s": LEASE_S,
                "beat_s": BEAT_S,
                "drain_s": 5.0,
            }
            | changes
        )
        self.gateway = GatewayServer(self.settings, folder / "gateway.log")
        self.url = self.gateway.url
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.supervisors: list[WorkerServer] = []
        self.broker = Broker(self.settings, patience_s=20.0)
        self._ended = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as ended:
            ended.callback(self.broker.close)
            ended.callback(self.ledger.close)
            ended.callback(self.redis.kill)
            self.redis.start()
            ended.callback(self.kill_gateway)
            self.start_gateway()
            self._ended = ended.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._ended:
            for supervisor in self.supervisors:
                self.kill_host(supervisor)

    def supervise(
        self, *, ready: bool = True, environment: dict[str, str] | None = None, **changes: Any
    ) -> WorkerServer:
        """Start one more supervisor, as on one more host, and wait until its workers are ready."""
        before = len(self.broker.workers())
        settings = self.settings.model_copy(update=changes)
        supervisor = WorkerServer(settings, self.folder / f"worker {len(self.supervisors)}.log")
        assert supervisor.env is not None
        supervisor.env |= environment or {}
        self.supervisors.append(supervisor.start())
        if ready:
            ready_workers(self.broker, before + settings.workers_per_device, within_s=START_S)
        return supervisor

    def start_gateway(self) -> None:
        self.gateway.start()
        eventually(lambda: answers(f"{self.url}/health"), within_s=START_S)

    def kill_gateway(self) -> None:
        """kill -9 of gunicorn and of the processes that serve."""
        kill_all(tree(self.gateway))
        self.gateway.kill()

    def kill_host(self, supervisor: WorkerServer) -> None:
        """kill -9 of a supervisor and all its workers, as when their machine is gone."""
        kill_all(tree(supervisor))
        supervisor.kill()

    def load(self, **options: Any) -> Load:
        return Load(options.pop("url", self.url), self.ledger, **options)

    def close_books(self, load: Load, *, within_s: float = 60.0) -> Report:
        """Let the fleet drain, and audit it."""
        load.drain(within_s)
        return self.audit()

    def audit(self, url: str = "") -> Report:
        """Audit the fleet as it stands, as seen through the gateway or another `url` before it."""
        return audit(self.ledger, url or self.url, self.settings)

    def log(self, number: int) -> str:
        """Return what the supervisor of this number and its workers have written so far."""
        path = self.folder / f"worker {number}.log"
        return path.read_text() if path.exists() else ""

    def ready(self) -> list[WorkerCard]:
        return [card for card in self.broker.workers() if card.state in ("idle", "busy")]


def sabotage(*what: str) -> dict[str, str]:
    """Return the environment in which a process breaks these things at its start; see sabotage/sitecustomize.py."""
    return {"PYTHONPATH": f"{SABOTAGE}{os.pathsep}{ROOT}", "ZFLEET_TEST_SABOTAGE": ",".join(what)}


def workers_of(supervisor: Server) -> list[psutil.Process]:
    """Return the children of a supervisor, none when it is gone."""
    try:
        return psutil.Process(supervisor.pid).children()
    except psutil.NoSuchProcess:
        return []


def tree(server: Server) -> list[psutil.Process]:
    """Return a server's process and all below it, none when it is gone."""
    try:
        process = psutil.Process(server.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_all(doomed: Sequence[psutil.Process]) -> None:
    """kill -9, all at once; psutil knows each one by its start time, so that no other process is ever meant."""
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """SIGSTOP a process for as long as the block lasts, or until somebody kills it."""
    process = psutil.Process(pid)
    process.suspend()
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=1).ok
    except requests.RequestException:
        return False


def within(check: Callable[[], object], limit_s: float) -> float:
    """Wait until `check()` is true and return how long that took, in seconds; fails the test after `limit_s`."""
    began = time.monotonic()
    while not check():
        if time.monotonic() - began > limit_s:
            pytest.fail(f"not within {limit_s} s")
        time.sleep(0.05)
    return time.monotonic() - began
