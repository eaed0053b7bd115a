"""What tests of the OpenAI dialect share: its addresses, its errors and events, and a worker that works by itself."""

from __future__ import annotations

import base64
import json
import threading
import time
from typing import Any

from werkzeug.test import TestResponse

from common import keys
from common.broker import Broker
from common.records import Claimed, Hold
from common.schemas import ResolvedRequest
from tests.servers import eventually
from tests.unit.gateway.fake_worker import FakeWorker

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


class Diligent:
    """A worker that finishes every task as it comes, by `succeed` or as it is told."""

    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker
        self.work = worker.succeed
        self.done: list[Claimed] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Diligent:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def request(self) -> ResolvedRequest:
        """Of the latest task."""
        return self.done[-1].request

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            for task in self.worker.take():
                self.done.append(task)
                self.work(task)


def error(answer: TestResponse) -> tuple[int, str, str | None]:
    """Status, code and param."""
    found = answer.get_json()["error"]
    assert found["type"] == ("server_error" if answer.status_code >= 500 else "invalid_request_error")
    return answer.status_code, found["code"], found["param"]


def events(answer: TestResponse) -> list[tuple[str, dict[str, Any]]]:
    """Each event's name and data; comments are left out."""
    assert answer.mimetype == "text/event-stream"
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n") if not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def stepwise(broker: Broker, diligent: Diligent) -> None:
    """Let the worker show a preview at each step."""

    def work(task: Claimed) -> None:
        eventually(lambda: dict(broker._redis.pubsub_numsub(keys.STEPS))[keys.STEPS])  # until the stream listens
        hold = Hold(task.task_id, task.fence)
        for step in range(task.request.steps):
            preview = base64.b64encode(b"preview %d" % step).decode()
            broker.progress("w1", {hold: (step + 1, task.request.steps)}, {hold: preview})
            time.sleep(0.05)
        diligent.worker.succeed(task)

    diligent.work = work
