"""A small picture of what is being painted, while it is: in the status and in the events, and gone afterwards."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from flask.testing import FlaskClient

from common.broker import Broker
from common.records import Claimed, Hold
from common.schemas import Progress, TaskRecord
from gateway.admission import OPEN
from gateway.app import TASKS
from gateway.dialects import native
from gateway.tasks import Tasks
from tests.servers import eventually
from tests.unit.gateway.fake_worker import FakeWorker

PREVIEW = "UklGRg=="
URL = f"data:image/webp;base64,{PREVIEW}"


def submit(client: FlaskClient, **fields: Any) -> str:
    body = {"prompt": "a red circle", "model": "simulated", **fields}
    return str(client.post("/api/submit", json=body).get_json()["task_id"])


def show(broker: Broker, task: Claimed, step: int, preview: str = PREVIEW) -> None:
    hold = Hold(task.task_id, task.fence)
    assert broker.progress("w1", {hold: (step, task.request.steps)}, {hold: preview}) == ["ok"]


def progress(client: FlaskClient, task_id: str) -> Any:
    return client.get(f"/api/status/{task_id}").get_json()["progress"]


def test_the_status_shows_the_newest_until_the_end(client: FlaskClient, broker: Broker, worker: FakeWorker) -> None:
    task_id = submit(client, preview=True, steps=4)
    (task,) = worker.take()
    assert task.request.preview
    assert progress(client, task_id) == {"step": 0, "steps": 4, "preview": None}
    show(broker, task, 1, "b2xk")
    show(broker, task, 2)
    show(broker, task, 3, "")  # no new one
    assert progress(client, task_id) == {"step": 3, "steps": 4, "preview": URL}
    worker.succeed(task)
    assert progress(client, task_id) == {"step": 4, "steps": 4, "preview": None}


def test_a_task_that_goes_back_into_its_queue_shows_nothing(
    client: FlaskClient, broker: Broker, worker: FakeWorker
) -> None:
    task_id = submit(client, preview=True)
    (task,) = worker.take()
    show(broker, task, 1)
    broker.release("w1", Hold(task.task_id, task.fence))
    assert progress(client, task_id)["preview"] is None


@pytest.mark.parametrize("wanted", [True, False])
def test_events_carry_each_once_and_only_where_it_was_asked_for(
    client: FlaskClient, broker: Broker, worker: FakeWorker, wanted: bool
) -> None:
    task_id = submit(client, preview=wanted)
    (task,) = worker.take()
    tasks: Tasks = client.application.extensions[TASKS]
    stream = native.render_events(tasks.follow(task_id, OPEN))
    assert next(stream).startswith("retry: ")
    assert next(stream).startswith("event: status")
    heard: list[str] = []
    follower = threading.Thread(target=lambda: heard.extend(stream))
    follower.start()

    def told() -> list[Any]:
        return [json.loads(text.partition("data: ")[2]) for text in heard if text.startswith("event: progress")]

    step = 0
    while len(told()) < 3:  # until the subscription stands, and some more
        show(broker, task, step := step + 1)
        time.sleep(0.05)
    show(broker, task, step + 1, "bmV3")
    eventually(lambda: told()[-1]["step"] == step + 1)
    worker.succeed(task)
    follower.join(5)
    previews = [each["preview"] for each in told()]
    assert [each for each in previews if each] == ([URL, "data:image/webp;base64,bmV3"] if wanted else [])
    assert (previews[0], previews[1]) == (URL if wanted else None, None)


def test_a_stream_that_begins_later_has_the_newest_in_its_status(
    client: FlaskClient, broker: Broker, worker: FakeWorker
) -> None:
    task_id = submit(client, preview=True)
    (task,) = worker.take()
    show(broker, task, 1)
    tasks: Tasks = client.application.extensions[TASKS]
    stream = tasks.follow(task_id, OPEN)
    first = next(stream)
    assert isinstance(first, TaskRecord) and first.preview == PREVIEW
    heard: list[Any] = []
    follower = threading.Thread(target=lambda: heard.extend(stream))
    follower.start()
    step = 1
    while not any(isinstance(each, Progress) for each in heard):
        show(broker, task, step := step + 1)
        time.sleep(0.05)
    worker.succeed(task)
    follower.join(5)
    assert {each.preview for each in heard if isinstance(each, Progress)} == {None}
