"""A worker's pulse on a real Redis: leases stay, progress is told, verdicts arrive, outages pass."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from common.broker import Broker
from common.cards import WorkerCard
from common.errors import RedisUnavailable
from common.settings import Settings
from tests.conftest import SubmitFn
from tests.servers import eventually
from worker.held import HeldTask
from worker.pipelines.base import ImageRequest, Run
from worker.pulse import Pulse


class Held:
    """A pulse over whatever is in `tasks`."""

    def __init__(self, broker: Broker, card: WorkerCard) -> None:
        self.broker = broker
        self.tasks: list[HeldTask] = []
        self.registered = threading.Event()
        self.asked_to_restart = threading.Event()
        self.pulse = Pulse(
            card.name, broker, beat_s=0.1, card=lambda: card, held=lambda: self.tasks, register=self.registered.set,
            restart=self.asked_to_restart.set,
        )  # fmt: skip

    def take(self) -> HeldTask:
        (claimed,) = self.broker.claim("w1", "cpu", ["simulated"], 1).tasks
        self.tasks.append(HeldTask(claimed=claimed, deadline=None, began=1.0))
        return self.tasks[-1]


@pytest.fixture
def held(settings: Settings, card: Callable[[str], WorkerCard]) -> Iterator[Held]:
    held = Held(Broker(settings.model_copy(update={"lease_s": 0.5, "beat_s": 0.1})), card("w1"))
    held.pulse.start()
    yield held
    held.pulse.stop()


def test_a_beating_worker_is_seen_and_keeps_its_lease(held: Held, submit: SubmitFn) -> None:
    submit()
    held.take()
    assert [card.name for card in held.broker.workers()] == ["w1"]
    for _ in range(5):
        threading.Event().wait(0.2)
        assert held.broker.reap() == []


def test_a_worker_that_rq_forgot_registers_again(held: Held) -> None:
    assert held.registered.wait(2)


def test_a_worker_that_is_asked_to_restart_hears_it_and_no_other(held: Held, broker: Broker) -> None:
    broker.restart("w2")
    assert not held.asked_to_restart.wait(0.3)
    broker.restart("w1")
    assert held.asked_to_restart.wait(2)


def test_progress_is_told_when_it_changes(held: Held, submit: SubmitFn) -> None:
    task_id = submit()
    task = held.take()
    task.runs.append(
        Run(request=ImageRequest(prompt="", width=64, height=64, steps=4, guidance_scale=0, seed=1), step=3)
    )
    held.pulse.stepped()
    eventually(lambda: held.broker.view(task_id).step == 3, within_s=2)  # type: ignore[union-attr]


def test_a_preview_is_told_once_beside_the_step(held: Held, submit: SubmitFn) -> None:
    task_id = submit()
    task = held.take()
    task.preview = np.full((8, 12, 3), 200, np.uint8)
    held.pulse.stepped()
    eventually(lambda: held.broker.preview(task_id), within_s=2)
    assert task.preview is None
    record = held.broker.view(task_id)
    assert record is not None and record.preview is not None
    with Image.open(io.BytesIO(base64.b64decode(record.preview))) as picture:
        assert (picture.format, picture.size) == ("WEBP", (12, 8))
        assert abs(np.asarray(picture.convert("RGB")).mean() - 200) < 5


def test_a_cancel_reaches_the_task(held: Held, submit: SubmitFn) -> None:
    task_id = submit()
    task = held.take()
    held.broker.cancel(task_id, "default")
    eventually(lambda: task.verdict == "cancel", within_s=2)


def test_a_lost_lease_reaches_the_task(held: Held, submit: SubmitFn) -> None:
    submit()
    task = held.take()
    held.broker.reap("w1")
    eventually(lambda: task.verdict == "lost", within_s=2)


def test_an_outage_does_not_stop_the_pulse(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    beat, beats = held.broker.beat, threading.Event()

    def away(*_: object) -> None:
        monkeypatch.setattr(held.broker, "beat", lambda *args: (beats.set(), beat(*args))[1])
        raise RedisUnavailable("away")

    monkeypatch.setattr(held.broker, "beat", away)
    assert beats.wait(3)


def test_what_was_counted_is_told_with_the_beats_and_at_the_stop(
    broker: Broker, card: Callable[[str], WorkerCard]
) -> None:
    counts = {"batch|simulated|1": 0}
    pulse = Pulse(
        "w1", broker, beat_s=0.1, card=lambda: card("w1"), held=list, register=lambda: None, restart=lambda: None,
        counts=counts.copy,
    )  # fmt: skip
    pulse.start()
    for steps in (3, 7):
        counts["batch|simulated|1"] = steps
        eventually(lambda steps=steps: broker.counts().get("batch|simulated|1") == steps)
    pulse._beat_s = 60.0
    eventually(lambda: not pulse._wake.is_set())
    counts["batch|simulated|1"] = 8
    pulse.stop()
    assert broker.counts()["batch|simulated|1"] == 8
