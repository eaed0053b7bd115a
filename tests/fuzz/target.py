"""A fleet to be fuzzed: a Redis of its own, gunicorn with every dialect, keys of two tenants, and a worker."""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import requests

from common import registry
from common.apikeys import ApiKey, Token
from common.broker import Broker
from common.records import Claimed, Hold
from common.settings import load_settings
from common.storage import open_storage
from gateway import dialects
from tests.servers import GatewayServer, RedisServer, eventually
from tests.unit.gateway.fake_worker import FakeWorker

START_S = 40.0
EVERY_NTH_FAILS = 5
EVERY_NTH_LINGERS = 3
LINGER_S = 0.1
NAMES = ("operator", "acme", "umbrella")  # whoever comes first sends most
ROOM = 64  # pictures that the worker takes at once


class Target:
    """The fleet between `with` and the end of the block. `keys`: those of two tenants and of an operator, by name."""

    def __init__(self, folder: Path) -> None:
        redis_folder = folder / "redis"
        redis_folder.mkdir(parents=True)
        self.redis = RedisServer(redis_folder)
        self.settings = load_settings(
            {
                "redis_url": self.redis.url,
                "data_dir": folder / "data dir",
                "models": ("simulated",),
                "dialects": tuple(registry.discover(dialects)),
                "queue_cap": 10**6,
            }
        )
        self.gateway = GatewayServer(self.settings, folder / "gateway.log")
        self.broker = Broker(self.settings)
        self._painter = Painter(FakeWorker(self.broker, open_storage(self.settings)))
        self._ended = contextlib.ExitStack()

    @property
    def url(self) -> str:
        return self.gateway.url

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as ended:
            ended.callback(self.broker.close)
            ended.enter_context(self.redis)
            self.keys = {name: self._give_key(name, admin=name == "operator") for name in NAMES}
            ended.enter_context(self._painter)
            ended.enter_context(self.gateway)
            eventually(self._answers, within_s=START_S)
            self._ended = ended.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.__exit__(kind, error, trace)

    @property
    def healthy(self) -> bool:
        """Whether nothing has died of what was sent so far."""
        return self._painter.alive and self._answers()

    def gateway_processes(self) -> set[int]:
        """The processes that answer."""
        return {child.pid for child in psutil.Process(self.gateway.pid).children()}

    def description(self) -> dict[str, Any]:
        """The API's description of itself."""
        answer = requests.get(f"{self.url}/openapi.json", timeout=10)
        return dict(answer.json())

    def _give_key(self, tenant: str, *, admin: bool = False) -> str:
        token = Token.new()
        made = datetime.now(UTC)
        self.broker.put_key(
            ApiKey(key_id=token.key_id, tenant=tenant, digest=token.digest, admin=admin, created_at=made)
        )
        return str(token)

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/ready", timeout=5).ok
        except requests.RequestException:
            return False


class Painter:
    """Ends tasks as soon as they are claimed, but for every third, which runs for a while; every fifth fails."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker
        self._stopping = threading.Event()
        self._ended = 0
        self._thread = threading.Thread(target=self._run, name="painter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        count, lingering = 0, list[Claimed]()
        while not self._stopping.is_set():
            self._worker.beat()
            ending, lingering = lingering, []
            for task in self._worker.take(ROOM):
                count += 1
                (ending if count % EVERY_NTH_LINGERS else lingering).append(task)
            for task in ending:
                self._end(task)
            self._worker.broker.wait(["simulated"], LINGER_S)

    def _end(self, task: Claimed) -> None:
        self._ended += 1
        hold = Hold(task.task_id, task.fence)
        if "cancel" in self._worker.broker.progress(self._worker.name, {hold: (1, task.request.steps)}):
            self._worker.broker.finish(self._worker.name, hold, "canceled")
        elif self._ended % EVERY_NTH_FAILS:
            self._worker.succeed(task)
        else:
            self._worker.fail(task)
